"""LoRA on a transformers classifier, through PEFT; per-example gradients or ghost clipping by one option.

    python examples/lora_peft.py --mode hooks
    python examples/lora_peft.py --mode ghost

A digit is read as a sentence of its 64 pixels, a word for each shade, padded after the last ink. Nothing is downloaded:
the tiny BERT has random weights, and stands for a pretrained one. If the import below says `opacus`, stock Opacus 1.6.0
runs this too, in both modes; in float64 its gradients and dither's were both the oracle's, to 1e-15.
"""

import argparse

import torch
from peft import LoraConfig, TaskType, get_peft_model
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForSequenceClassification

from dither.opacus import PrivacyEngine

PAD, SHADES = 0, 17


def build_model():
    config = BertConfig(
        vocab_size=1 + SHADES,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=10,
        pad_token_id=PAD,
    )
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS, r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["query", "value"]
    )
    return get_peft_model(BertForSequenceClassification(config), lora)


def sentences():
    """Token ids and attention mask (N, 64), and the digits (N,)."""
    digits = load_digits()
    shades = torch.tensor(digits.data).long()
    mask = shades.flip(1).cumsum(1).flip(1).gt(0).long()
    ids = torch.where(mask.bool(), 1 + shades, PAD)
    return TensorDataset(ids, mask, torch.tensor(digits.target))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--mode", choices=["hooks", "ghost"], default="ghost")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=128)
    args = parser.parse_args()

    model = build_model()
    model.print_trainable_parameters()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
    criterion = nn.CrossEntropyLoss()
    engine = PrivacyEngine()
    model, optimizer, *criteria, loader = engine.make_private(
        module=model.train(),
        optimizer=optimizer,
        criterion=criterion,
        data_loader=DataLoader(sentences(), batch_size=args.batch_size),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=args.mode,
    )
    if args.mode == "ghost":
        (criterion,) = criteria

    for epoch in range(args.epochs):
        for ids, mask, labels in loader:
            optimizer.zero_grad()
            logits = model(input_ids=ids, attention_mask=mask).logits
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
        epsilon = engine.get_epsilon(delta=1e-4)
        print(f"epoch {epoch}: loss {loss.item():.3f} (not private), epsilon {epsilon:.2f} at delta 1e-4")


if __name__ == "__main__":
    main()
