"""A Lightning module with a torchvision vision transformer. The script is plain Opacus, without a line of dither.

    python -m dither.opacus examples/lightning_module.py

Lightning keeps its loop: `configure_optimizers` makes the network private, and the trainer takes the Poisson batches.
`python examples/lightning_module.py`, with stock Opacus 1.6.0, runs too.
"""

import argparse
import logging

import lightning
import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import VisionTransformer


def build_model():
    """A tiny ViT; the engine wants Opacus's own attention in place of torch's, and `fix` puts it there."""
    vit = VisionTransformer(
        image_size=8, patch_size=2, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10
    )
    return ModuleValidator.fix(vit)


class PrivateClassifier(lightning.LightningModule):
    def __init__(self, network, dataset, batch_size, delta=1e-4):
        super().__init__()
        self.network, self.delta = network, delta
        self.loader = DataLoader(dataset, batch_size=batch_size)
        self.engine = PrivacyEngine()

    def configure_optimizers(self):
        self.network, optimizer, self.loader = self.engine.make_private(
            module=self.network.train(),
            optimizer=torch.optim.AdamW(self.network.parameters(), lr=2e-3),
            data_loader=self.loader,
            noise_multiplier=1.0,
            max_grad_norm=1.0,
        )
        return optimizer

    def train_dataloader(self):
        return self.loader

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.network(images), labels)
        self.log("loss_not_private", loss, batch_size=len(images))
        return loss

    def on_train_epoch_end(self):
        loss = self.trainer.callback_metrics["loss_not_private"]
        epsilon = self.engine.get_epsilon(self.delta)
        print(f"epoch {self.current_epoch}: loss {loss:.3f} (not private), epsilon {epsilon:.2f} at delta {self.delta}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    dataset = TensorDataset(images, torch.tensor(digits.target))
    classifier = PrivateClassifier(build_model(), dataset, args.batch_size)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(classifier)


if __name__ == "__main__":
    main()
