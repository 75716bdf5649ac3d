"""The loop: public divisor, one noise draw a logical batch, empty batches, resume, certificate, bad input."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import oracle
from dither import errors
from dither.training import PrivateTraining

N = 24


def dataset(n=N):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


def loss_fn(net, batch):
    x, y = batch
    return F.cross_entropy(net(x), y, reduction="none")


def make(net=None, optimizer=None, **options):
    net = model() if net is None else net
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0) if optimizer is None else optimizer(net.parameters())
    defaults = {"expected_batch_size": 8, "steps": 4, "noise_multiplier": 1.0, "max_grad_norm": 0.5}
    return PrivateTraining(net, optimizer, dataset(), loss_fn, **(defaults | options))


def weights(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_of_parameters_in_half_precision_are_rounded_after_the_noise(dtype):
    """Micro-batches of one example, each of which adds 1: bfloat16 counts to 256 that way, float16 to 2048."""
    count = {torch.bfloat16: 300, torch.float16: 2100}[dtype]
    net, ones = nn.Linear(1, 1, bias=False).to(dtype), TensorDataset(torch.ones(count, 1, dtype=dtype))
    training = PrivateTraining(
        net,
        torch.optim.SGD(net.parameters(), lr=0.0),
        ones,
        lambda net, batch: net(batch[0]).float().sum(1) * 10,
        expected_batch_size=count,
        steps=2,
        noise_multiplier=1e-9,
        microbatch_size=1,
        verify_first_batch=False,
    )
    for step in training:
        assert step.batch_size == count
        assert net.weight.grad.dtype == dtype and float(net.weight.grad) == pytest.approx(1.0, rel=2**-8)


@pytest.mark.parametrize("microbatch_size", [1, 3, 100, "auto"])
def test_the_update_is_the_clipped_sum_over_the_expected_batch_size(microbatch_size):
    net = model().eval()
    before = weights(net)
    training = make(net, noise_multiplier=1e-9, microbatch_size=microbatch_size)
    indices = np.array([0, 3, 5, 7, 11])
    training.sampler.draw = lambda step: indices
    batch = tuple(t[indices] for t in dataset().tensors)
    truth = oracle.clipped_sum(oracle.per_example_gradients(net, lambda: loss_fn(net, batch)), 0.5)
    step = training.step()
    expected = before - torch.cat([g.flatten() for g in truth.values()]) / 8  # not / 5, the realised size
    torch.testing.assert_close(weights(net), expected, rtol=1e-5, atol=1e-7)
    assert step.batch_size == 5 and step.index == 1 and 0 <= step.clip_fraction <= 1


@pytest.mark.parametrize("microbatch_size", [2, 100])
def test_noise_is_drawn_once_a_logical_batch_at_the_claimed_scale(microbatch_size):
    net = nn.Linear(300, 300)
    x = torch.randn(12, 300)
    training = PrivateTraining(
        net,
        torch.optim.SGD(net.parameters(), lr=1.0),
        TensorDataset(x),
        lambda m, b: m(b[0]).sum(1) * 0,
        expected_batch_size=6,
        steps=3,
        noise_multiplier=2.0,
        max_grad_norm=0.5,
        microbatch_size=microbatch_size,
        verify_first_batch=False,
    )
    moves = []
    for _ in training:
        moves.append(torch.cat([p.grad.flatten().clone() for p in net.parameters()]))
    for move in moves:
        assert abs(float(move.std()) / (2.0 * 0.5 / 6) - 1) < 0.01
    correlations = torch.corrcoef(torch.stack(moves)) - torch.eye(3)
    assert correlations.abs().max() < 5 / moves[0].numel() ** 0.5


def test_an_empty_batch_takes_a_noisy_step():
    net = model()
    training = make(net)
    training.sampler.draw = lambda step: np.zeros(0, dtype=np.int64)
    before = weights(net)
    step = training.step()
    assert step.batch_size == 0 and math.isnan(step.loss) and training.ledger.steps == 1
    assert (weights(net) - before).abs().min() > 0


def test_epsilon_is_met_shown_and_never_understated():
    training = make(noise_multiplier=None, epsilon=3.0, steps=70, delta=1e-3)
    shown = []
    for step in training:
        shown.append(step.epsilon)
        if step.index % 23 == 1:
            assert step.epsilon >= training.epsilon() - 1e-12
    assert shown == sorted(shown) and shown[-1] == pytest.approx(training.epsilon(), rel=1e-6)
    assert 2.9 < shown[-1] <= 3.0 and len(training) == 70
    with pytest.raises(errors.LedgerError, match="planned"):
        training.step()


def adam_with_schedule(net):
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    return optimizer, torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5)


def seeded(net, steps=5):
    optimizer, scheduler = adam_with_schedule(net)
    return PrivateTraining(
        net,
        optimizer,
        dataset(),
        loss_fn,
        expected_batch_size=8,
        steps=steps,
        noise_multiplier=1.0,
        seed=7,
        ema_decay=0.9,
        scheduler=scheduler,
    )


def test_resume_at_every_step_is_bit_identical_when_the_randomness_is_fixed(tmp_path):
    net = model()
    straight = seeded(net)
    for step in straight:
        straight.save(tmp_path / f"at{step.index}")
    for start in range(1, 5):
        other = model()
        optimizer, scheduler = adam_with_schedule(other)
        resumed = PrivateTraining.resume(
            tmp_path / f"at{start}", other, optimizer, dataset(), loss_fn, scheduler=scheduler
        )
        assert resumed.index == start
        for _ in resumed:
            pass
        assert torch.equal(weights(other), weights(net)), start
        assert resumed.ledger == straight.ledger and resumed.epsilon() == straight.epsilon()
        assert all(torch.equal(resumed.ema[n], straight.ema[n]) for n in straight.ema)
        certificate = resumed.certificate()
        assert certificate["resumed"] == 1 and certificate["private"] is False


def test_resume_never_repeats_noise_or_batches(tmp_path):
    make().save(tmp_path / "start")
    moves, sizes = [], []
    for _ in range(2):
        net = model()
        training = PrivateTraining.resume(
            tmp_path / "start", net, torch.optim.SGD(net.parameters(), lr=1.0), dataset(), loss_fn
        )
        before = weights(net)
        sizes.append([training.sampler.draw(0).tolist() for _ in range(3)])
        training.step()
        moves.append(weights(net) - before)
    assert not torch.equal(*moves) and sizes[0] != sizes[1]


def test_a_loop_left_early_goes_on():
    training = make()
    for step in training:
        if step.index == 2:
            break
    assert training.index == 2
    assert [step.index for step in training] == [3, 4]


def test_the_certificate_says_what_holds():
    training = make(seed=None)
    for _ in training:
        pass
    certificate = json.loads(json.dumps(training.certificate()))
    assert certificate["private"] is True and certificate["reasons"] == []
    assert certificate["epsilon"] == training.epsilon() and certificate["delta"] == 1e-5
    assert certificate["ledger"] == [
        {"sampling_probability": 8 / N, "noise_multiplier": 1.0, "count": 4, "release": "gradients"}
    ]
    assert certificate["neighbouring_relation"] == "add or remove one example"
    assert certificate["verification"]["exact"] is True
    assert "loss" in certificate["not_private_values_that_left_the_process"]
    unchecked = make(verify_first_batch=False)
    unchecked.step()
    assert unchecked.certificate()["verification"]["exact"] is None
    assert make(seed=1).certificate()["private"] is False


def test_a_poisoned_example_is_dropped_and_counted():
    data = dataset()
    data.tensors[0][3] = float("nan")
    net = model()
    training = PrivateTraining(
        net,
        torch.optim.SGD(net.parameters(), lr=1.0),
        data,
        loss_fn,
        expected_batch_size=N,
        steps=1,
        noise_multiplier=1.0,
    )
    step = training.step()
    assert training.verification["exact"] is True  # on the finite ones
    assert step.dropped == 1 and math.isfinite(step.loss) and weights(net).isfinite().all()


def test_weights_that_are_not_finite_end_the_run_before_more_is_spent(tmp_path):
    training = make(optimizer=lambda p: torch.optim.SGD(p, lr=1e38), max_grad_norm=1e3, ema_decay=0.9)
    training.save(tmp_path)
    with pytest.raises(errors.DivergedError, match="after step 1"):
        list(training)
    assert training.ledger.steps == 1  # its noisy sum was released to the optimizer
    assert all(tensor.isfinite().all() for tensor in training.ema.values())
    net = model()
    assert (
        PrivateTraining.resume(tmp_path, net, torch.optim.SGD(net.parameters(), lr=1.0), dataset(), loss_fn).index == 0
    )


def test_bad_arguments_are_named_before_any_work():
    for options, error in (
        ({"epsilon": 1.0}, errors.ConfigurationError),
        ({"delta": 0.0}, errors.ConfigurationError),
        ({"steps": 0}, errors.ConfigurationError),
        ({"max_grad_norm": 0.0}, errors.ConfigurationError),
        ({"noise_multiplier": -1.0}, errors.ConfigurationError),
        ({"expected_batch_size": 25}, errors.BatchSizeError),
        ({"strategy": "fast"}, errors.UnknownStrategyError),
        ({"microbatch_size": 0}, errors.ConfigurationError),
        ({"clipping": "none"}, errors.UnknownClippingError),
        ({"ema_decay": 1.0}, errors.ConfigurationError),
        ({"noise_multiplier": None, "epsilon": 1e-6, "steps": 100000}, errors.BudgetError),
    ):
        with pytest.raises(error):
            make(**options)
    other = nn.Linear(2, 2)
    with pytest.raises(errors.ConfigurationError, match="optimizer"):
        PrivateTraining(model(), torch.optim.SGD(other.parameters(), lr=1.0), dataset(), loss_fn, expected_batch_size=8)
    with pytest.raises(errors.EmptyDatasetError):
        PrivateTraining(other, torch.optim.SGD(other.parameters(), lr=1.0), dataset(0), loss_fn)


def test_losses_that_are_not_one_an_example_are_refused():
    for wrong in (lambda m, b: loss_fn(m, b).mean(), lambda m, b: m(b[0]).flatten()):
        net = model()
        before = weights(net)
        training = PrivateTraining(
            net,
            torch.optim.SGD(net.parameters(), lr=1.0),
            dataset(),
            wrong,
            expected_batch_size=N,
            steps=2,
            noise_multiplier=1.0,
            verify_first_batch=False,
        )
        with pytest.raises(errors.CaptureError):
            training.step()
        assert torch.equal(weights(net), before) and training.index == 0


def test_foreign_damaged_and_mismatched_folders(tmp_path):
    net = model()

    def resume(path, n=N, other=net):
        return PrivateTraining.resume(path, other, torch.optim.SGD(other.parameters(), lr=1.0), dataset(n), loss_fn)

    make().save(tmp_path / "run")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "checkpoint.json").write_text("{}")
    for path in ("nowhere", "foreign"):
        with pytest.raises(errors.RunFolderError):
            resume(tmp_path / path)
    with pytest.raises(errors.LedgerError, match="25"):
        resume(tmp_path / "run", n=25)
    with pytest.raises(errors.RunFolderError):
        resume(tmp_path / "run", other=nn.Linear(4, 3))
    (tensors,) = (tmp_path / "run").glob("state-*.pt")
    tensors.write_bytes(tensors.read_bytes()[:100])
    with pytest.raises(errors.RunFolderError, match="damaged"):
        resume(tmp_path / "run")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.OutputPathError):
        make().save(tmp_path / "file" / "run")


def test_optimizers_that_would_escape_the_mechanism_are_refused():
    net, other = model(), nn.Linear(2, 2)
    both = torch.optim.SGD([*net.parameters(), *other.parameters()], lr=1.0)
    for optimizer, match in ((both, "not the model's"), (torch.optim.LBFGS(net.parameters()), "LBFGS")):
        with pytest.raises(errors.ConfigurationError, match=match):
            PrivateTraining(net, optimizer, dataset(), loss_fn, expected_batch_size=8)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(torch.optim.SGD(net.parameters(), lr=1.0))
    with pytest.raises(errors.ConfigurationError, match="not private"):
        make(net, scheduler=plateau)
    frozen = model().requires_grad_(False)
    with pytest.raises(errors.ConfigurationError, match="no trainable"):
        make(frozen)


def test_a_frozen_parameter_takes_no_step_with_an_old_gradient():
    """An optimizer updates whatever has a gradient: one of before the freezing is neither clipped nor noised."""
    net = model()
    loss_fn(net, dataset().tensors).sum().backward()
    net[0].requires_grad_(False)
    before = weights(net[0])
    training = make(net)
    for _ in training:
        loss_fn(net, dataset().tensors).sum().backward()
    torch.testing.assert_close(weights(net[0]), before, rtol=0, atol=0)


def test_verification_does_not_disturb_the_run():
    def augmented(examples):  # in the reading, as in the training: random numbers of both go on as without
        batch = torch.utils.data.default_collate(examples)
        return [batch[0] + torch.rand_like(batch[0]), *batch[1:]]

    def run(verify_first_batch):
        net = model()
        torch.manual_seed(5)
        training = make(
            net,
            noise_multiplier=1e-9,
            verify_first_batch=verify_first_batch,
            collate_fn=augmented,
            microbatch_size=3,
        )
        training.sampler.draw = lambda step: np.arange(6)
        training.step()
        return weights(net), torch.rand(3)

    for verified, plain in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(verified, plain, rtol=0, atol=1e-7)


def test_an_interrupt_in_the_optimizer_counts_the_noisy_sum_as_released():
    training = make()

    def interrupted(closure=None):
        raise KeyboardInterrupt

    training.optimizer.step = interrupted
    with pytest.raises(KeyboardInterrupt):
        training.step()
    assert training.index == 1 and training.epsilon() > 0


def test_the_average_warms_up():
    net = model()
    training = make(net, ema_decay=0.999)
    name, parameter = next(iter(net.named_parameters()))
    expected = parameter.detach().clone()
    for step in training:
        decay = (1 + step.index) / (10 + step.index)
        expected = decay * expected + (1 - decay) * parameter.detach()
    torch.testing.assert_close(training.ema[name], expected)


def test_saving_again_replaces_one_state_and_a_failed_save_keeps_the_old_one(tmp_path, monkeypatch):
    net = model()
    optimizer = torch.optim.AdamW(net.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    training = PrivateTraining(
        net, optimizer, dataset(), loss_fn, expected_batch_size=8, steps=4, noise_multiplier=1.0, scheduler=scheduler
    )
    (tmp_path / "notes.txt").write_text("mine")
    training.step()
    training.save(tmp_path)
    training.step()
    training.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3 and (tmp_path / "notes.txt").exists()
    training.step()
    with monkeypatch.context() as patched:
        patched.setattr("dither.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(errors.OutputPathError, match="disk full"):
            training.save(tmp_path)
    fresh = model()
    optimizer = torch.optim.AdamW(fresh.parameters())
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    resumed = PrivateTraining.resume(tmp_path, fresh, optimizer, dataset(), loss_fn, scheduler=scheduler)
    assert resumed.index == 2
    with pytest.raises(errors.RunFolderError, match="AdamW"):
        PrivateTraining.resume(tmp_path, fresh, torch.optim.SGD(fresh.parameters(), lr=1.0), dataset(), loss_fn)


def test_performance_can_change_without_the_mechanism():
    training = make(microbatch_size=4)
    training.step()
    ledger = training.ledger.events
    training.set_performance(microbatch_size=2, strategy="two_pass")
    training.step()
    assert (
        training.microbatches.current == 2 and training.ledger.events[0].noise_multiplier == ledger[0].noise_multiplier
    )
    with pytest.raises(errors.UnknownStrategyError):
        training.set_performance(microbatch_size=2, strategy="fast")
