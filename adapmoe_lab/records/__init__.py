"""What was measured and decided: frozen values, numpy only, saved with a schema version."""

from adapmoe_lab.records.cache_plan import CachePlan
from adapmoe_lab.records.config import TunedConfig
from adapmoe_lab.records.expert_format import ExpertFormat
from adapmoe_lab.records.files import RecordError
from adapmoe_lab.records.gating_table import OFF, GatingTable
from adapmoe_lab.records.hardware import HardwareProfile
from adapmoe_lab.records.latency import LatencyReport
from adapmoe_lab.records.loss import LossReport
from adapmoe_lab.records.measurement import IncomparableError, Measurement
from adapmoe_lab.records.precision import PRECISIONS, Precision, precision_named
from adapmoe_lab.records.precision_plan import PrecisionPlan
from adapmoe_lab.records.predictors import Predictors
from adapmoe_lab.records.prefetch import PrefetchSource, PrefetchTable
from adapmoe_lab.records.published import PublishedAdapMoE, PublishedRun
from adapmoe_lab.records.routing import Prediction, RoutingTrace
from adapmoe_lab.records.sensitivity import SensitivityProfile
from adapmoe_lab.records.spec import MoESpec, PartialIdentityWarning
from adapmoe_lab.records.surrogates import Surrogates
from adapmoe_lab.records.targets import LinkTarget, load_targets
from adapmoe_lab.records.traffic import Traffic

__all__ = [
    "OFF",
    "PRECISIONS",
    "CachePlan",
    "ExpertFormat",
    "GatingTable",
    "HardwareProfile",
    "IncomparableError",
    "LatencyReport",
    "LinkTarget",
    "LossReport",
    "Measurement",
    "MoESpec",
    "PartialIdentityWarning",
    "Precision",
    "PrecisionPlan",
    "Prediction",
    "Predictors",
    "PrefetchSource",
    "PrefetchTable",
    "PublishedAdapMoE",
    "PublishedRun",
    "RecordError",
    "RoutingTrace",
    "SensitivityProfile",
    "Surrogates",
    "Traffic",
    "TunedConfig",
    "load_targets",
    "precision_named",
]
