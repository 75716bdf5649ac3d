"""The public names and the commands' options, frozen: a change here is a decision, and gets a line in CHANGELOG.md."""

from __future__ import annotations

import inspect

import pytest

import dither
import dither.opacus
from dither.cli import bench, budget, certificate, encode, evaluate, export, options, report, sample, verify
from dither.cli.main import COMMANDS

NAMES = {
    "ClippedSum",
    "DitherError",
    "PrivateTraining",
    "VerificationReport",
    "__version__",
    "batched",
    "clipped_sum",
    "compile",
    "constant",
    "keep_memory",
    "per_example_gradients",
    "per_example_norms",
    "register_rule",
    "verify",
}

ARGUMENTS = {
    "batched": "tensor axis=0",
    "constant": "tensor",
    "keep_memory": "",
    "compile": "module backend='inductor' dynamic=None",
    "clipped_sum": (
        "model loss_fn max_grad_norm=1.0 clipping='flat' strategy='auto' rows_per_example=None memory_budget=None "
        "into=None randomness='different'"
    ),
    "per_example_gradients": "model loss_fn randomness='different'",
    "per_example_norms": "model loss_fn randomness='different'",
    "verify": "model loss_fn strategies=('auto', 'hold', 'ghost', 'tile', 'two_pass')",
    "PrivateTraining": (
        "model optimizer dataset loss_fn expected_batch_size=256 steps=1000 max_grad_norm=1.0 delta=1e-05 epsilon=None "
        "noise_multiplier=None microbatch_size='auto' clipping='flat' collate_fn=None seed=None strategy='auto' "
        "memory_budget=None rows_per_example=None ema_decay=None scheduler=None verify_first_batch=True "
        "prior=()"
    ),
    "PrivateTraining.resume": "path model optimizer dataset loss_fn scheduler=None collate_fn=None",
    "PrivateTraining.set_performance": "self microbatch_size strategy='auto' memory_budget=None",
    "PrivateTraining.save": "self path",
    "PrivateTraining.epsilon": "self delta=None",
    "PrivateTraining.certificate": "self",
}

OPTIONS = {
    "train": (
        options.train_parser,
        """
        config output resume seed save_every model model.help
        finetune.from finetune.mode finetune.rank finetune.alpha finetune.targets
        pretrain.path pretrain.steps pretrain.learning_rate pretrain.batch_size pretrain.labels pretrain.class_names
        pretrain.num_classes pretrain.skip_broken pretrain.image_column pretrain.label_column
        unet.kind unet.block_out_channels unet.layers_per_block unet.norm_num_groups unet.attention_head_dim
        unet.attention unet.patch_size
        data.path data.image_size data.channels data.resize data.crop data.class_names data.num_classes
        data.skip_broken data.image_column data.label_column
        privacy.epsilon privacy.delta privacy.noise_multiplier privacy.max_grad_norm privacy.expected_batch_size
        privacy.steps privacy.clipping
        warm_up.kind warm_up.share warm_up.rank warm_up.components
        warm_up.draws warm_up.noise_multiplier warm_up.clip_norm warm_up.sample_rate warm_up.centre warm_up.steps
        warm_up.learning_rate
        telemetry.wandb telemetry.mlflow telemetry.project telemetry.non_private telemetry.samples
        performance.strategy performance.microbatch_size performance.memory_budget performance.threads
        recipe.model recipe.hidden_size recipe.depth recipe.num_heads recipe.patch_size recipe.multiplicity
        recipe.timestep_frequencies
        recipe.optimizer
        recipe.learning_rate recipe.lr_schedule recipe.ema_decay recipe.prediction recipe.weighting recipe.timesteps
        recipe.timestep_distribution recipe.timestep_mean recipe.timestep_std recipe.timestep_pieces
        recipe.sigma_data recipe.label_std recipe.beta_schedule
        recipe.label_dropout recipe.sampler recipe.sampler_steps recipe.guidance
        """,
    ),
    "encode": (
        encode.encode_parser,
        """
        config split vae output posterior dtype batch_size
        data.path data.image_size data.channels data.resize data.crop data.class_names data.num_classes
        data.skip_broken data.image_column data.label_column
        """,
    ),
    "sample": (
        sample.sample_parser,
        """
        run config label count output folder npz overwrite guidance sampler steps s_churn s_min s_max s_noise weights
        seed vae batch_size
        """,
    ),
    "evaluate": (
        evaluate.evaluate_parser,
        """
        source config held_out count classifiers features inception_weights seed output private_score private_delta
        data.path data.image_size data.channels data.resize data.crop data.class_names data.num_classes
        data.skip_broken data.image_column data.label_column
        """,
    ),
    "export": (export.export_parser, "run folder config to weights vae approximate"),
    "budget": (
        budget.budget_parser,
        "config dataset_size batch_size delta epsilon noise_multiplier steps json",
    ),
    "verify": (verify.verify_parser, "model config examples strategy dtype mode seed json"),
    "report": (report.report_parser, "run output public"),
    "certificate": (certificate.certificate_parser, "action file"),
    "bench": (
        bench.bench_parser,
        """
        config models contenders smoke compile microbatches pairs warm_up threads memory sweep explain jax_python
        load save page picture check
        """,
    ),
}


OPACUS_NAMES = """
    AbstractGradSampleHooks AbstractGradSampleModule AdaClipDPOptimizer BatchMemoryManager DPDataLoader
    DPLossFastGradientAdaptiveClipping DPLossFastGradientClipping DPOptimizer DPOptimizerFastGradientClipping
    DPPerLayerOptimizer DPTensorFastGradientAdaptiveClipping DPTensorFastGradientClipping
    DifferentiallyPrivateDistributedDataParallel DistributedDPOptimizer
    DistributedDPOptimizerFastGradientClipping GaussianAccountant GradSampleHooks GradSampleHooksFastGradientClipping
    GradSampleHooksNoOp GradSampleModule GradSampleModuleExpandedWeights GradSampleModuleFastGradientClipping
    GradSampleModuleNoOp ModuleValidator PRVAccountant PrivacyEngine PrivacyEngineAdaptiveClipping RDPAccountant
    SimpleDistributedPerLayerOptimizer
    create_or_accumulate_grad_sample get_gsm_class get_hooks_class get_noise_multiplier get_optimizer_class install
    installed opacus_version prepare_module register_grad_sampler register_module_fixer register_module_validator
    register_norm_sampler switch_generator uninstall wrap_collate_with_empty wrap_data_loader wrap_model
"""


def test_opacus_names():
    assert set(dither.opacus.__all__) == set(OPACUS_NAMES.split())
    assert all(hasattr(dither.opacus, name) for name in dither.opacus.__all__)


def test_names():
    assert set(dither.__all__) == NAMES
    assert all(hasattr(dither, name) for name in NAMES)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    found: object = dither
    for part in name.split("."):
        found = getattr(found, part)
    parameters = inspect.signature(found).parameters.values()
    words = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in parameters]
    assert " ".join(words) == ARGUMENTS[name]


def test_commands():
    assert list(COMMANDS) == list(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_options(command):
    parser, expected = OPTIONS[command]
    named = {"help", "print_config", "data", "privacy", "performance", "recipe", "telemetry", "unet", "warm_up"}
    groups = {*named, "finetune", "pretrain"}
    assert {action.dest for action in parser()._actions} - groups == set(expected.split()) - groups


def test_short_options_lead_to_long_ones():
    assert set(options.SHORT.values()) <= {f"--{action.dest}" for action in options.train_parser()._actions}


def test_no_option_is_both_privacy_and_performance():
    privacy, performance = (set(group.__dataclass_fields__) for group in (options.Privacy, options.Performance))
    assert not privacy & performance
