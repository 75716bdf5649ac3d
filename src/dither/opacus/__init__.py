"""Opacus's names and behaviour, for models whose forward takes anything.

Three ways in: import from here; `dither.opacus.install()`, after which whatever imports from `opacus` gets these; or
`python -m dither.opacus script.py`, which installs and runs the script unchanged.
"""

from opacus import __version__ as opacus_version
from opacus.accountants import GaussianAccountant, PRVAccountant, RDPAccountant
from opacus.accountants.utils import get_noise_multiplier
from opacus.data_loader import DPDataLoader, switch_generator, wrap_collate_with_empty
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import create_or_accumulate_grad_sample, register_grad_sampler, register_norm_sampler
from opacus.utils.batch_memory_manager import BatchMemoryManager, wrap_data_loader
from opacus.validators import ModuleValidator, register_module_fixer, register_module_validator

from dither.opacus.adaptive import (
    DPLossFastGradientAdaptiveClipping,
    DPTensorFastGradientAdaptiveClipping,
    PrivacyEngineAdaptiveClipping,
)
from dither.opacus.choose import get_gsm_class, get_hooks_class, get_optimizer_class, prepare_module, wrap_model
from dither.opacus.fast_gradient_clipping import (
    GradSampleHooksFastGradientClipping,
    GradSampleModuleFastGradientClipping,
)
from dither.opacus.hooks import GradSampleHooks, GradSampleModule
from dither.opacus.installing import install, installed, uninstall
from dither.opacus.loss import DPLossFastGradientClipping, DPTensorFastGradientClipping
from dither.opacus.modes import GradSampleModuleExpandedWeights, GradSampleModuleNoOp
from dither.opacus.optimizers import (
    AdaClipDPOptimizer,
    DistributedDPOptimizer,
    DistributedDPOptimizerFastGradientClipping,
    DPOptimizer,
    DPOptimizerFastGradientClipping,
    DPPerLayerOptimizer,
    SimpleDistributedPerLayerOptimizer,
)
from dither.opacus.privacy_engine import PrivacyEngine
from dither.opacus.stock import AbstractGradSampleHooks, AbstractGradSampleModule, GradSampleHooksNoOp

__all__ = [
    "AbstractGradSampleHooks",
    "AbstractGradSampleModule",
    "AdaClipDPOptimizer",
    "BatchMemoryManager",
    "DPDataLoader",
    "DPLossFastGradientAdaptiveClipping",
    "DPLossFastGradientClipping",
    "DPOptimizer",
    "DPOptimizerFastGradientClipping",
    "DPPerLayerOptimizer",
    "DPTensorFastGradientAdaptiveClipping",
    "DPTensorFastGradientClipping",
    "DifferentiallyPrivateDistributedDataParallel",
    "DistributedDPOptimizer",
    "DistributedDPOptimizerFastGradientClipping",
    "GaussianAccountant",
    "GradSampleHooks",
    "GradSampleHooksFastGradientClipping",
    "GradSampleHooksNoOp",
    "GradSampleModule",
    "GradSampleModuleExpandedWeights",
    "GradSampleModuleFastGradientClipping",
    "GradSampleModuleNoOp",
    "ModuleValidator",
    "PRVAccountant",
    "PrivacyEngine",
    "PrivacyEngineAdaptiveClipping",
    "RDPAccountant",
    "SimpleDistributedPerLayerOptimizer",
    "create_or_accumulate_grad_sample",
    "get_gsm_class",
    "get_hooks_class",
    "get_noise_multiplier",
    "get_optimizer_class",
    "install",
    "installed",
    "opacus_version",
    "prepare_module",
    "register_grad_sampler",
    "register_module_fixer",
    "register_module_validator",
    "register_norm_sampler",
    "switch_generator",
    "uninstall",
    "wrap_collate_with_empty",
    "wrap_data_loader",
    "wrap_model",
]
