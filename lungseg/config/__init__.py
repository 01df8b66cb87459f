"""Configuration: one frozen dataclass per command, presets, TOML files, validation."""

from lungseg.config.benchmark import BenchmarkConfig
from lungseg.config.cluster import ClusterConfig
from lungseg.config.evaluate import EvaluateConfig
from lungseg.config.execution import Execution
from lungseg.config.export_model import ExportModelConfig
from lungseg.config.extract_radiomics import RadiomicsConfig
from lungseg.config.phantom import PhantomConfig
from lungseg.config.preprocess import PreprocessConfig
from lungseg.config.presets import PRESETS, make_config
from lungseg.config.refine import RefineConfig
from lungseg.config.report import ReportConfig
from lungseg.config.synthesize import SynthesizeConfig
from lungseg.config.train_ddpm import TrainConfig

__all__ = [
    "PRESETS",
    "BenchmarkConfig",
    "ClusterConfig",
    "EvaluateConfig",
    "Execution",
    "ExportModelConfig",
    "PhantomConfig",
    "PreprocessConfig",
    "RadiomicsConfig",
    "RefineConfig",
    "ReportConfig",
    "SynthesizeConfig",
    "TrainConfig",
    "make_config",
]
