"""Every command: its help, its settings and its library function, as names, so that listing them imports nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Command:
    """One stage. ``script`` is set where the function runs in a process of its own under ``accelerate launch``."""

    help: str
    config_module: str
    config: str
    module: str
    function: str
    script: str = ""

    def config_class(self) -> Any:
        """Import the settings (light)."""
        return getattr(import_module(f"neureasoner.{self.config_module}"), self.config)

    def load(self) -> Callable[[Any], Any]:
        """Import the library function (heavy)."""
        return getattr(import_module(f"neureasoner.{self.module}"), self.function)


def _data(help: str, config: str, module: str, function: str) -> Command:
    return Command(help, "data_builders.config", config, f"data_builders.{module}", function)


def _probes(help: str, config: str, module: str) -> Command:
    return Command(help, "probes.config", config, f"probes.{module}", module.rsplit(".", 1)[-1])


COMMANDS: dict[str, Command] = {
    "data problems": _data("write a problem file", "ProblemsConfig", "problem_file", "build_problems"),
    "data rollouts": _data("sample responses to problems", "RolloutsConfig", "rollouts", "sample_rollouts"),
    "data judge": _data("label traces: wrong steps, loops, answers", "JudgeConfig", "judging", "judge_traces"),
    "data reconstruct": _data(
        "turn failures into repairs to train on", "ReconstructConfig", "reconstruct", "reconstruct"
    ),
    "data pairs": Command(
        "failing and clean continuations of the same prefix",
        "data_builders.pairs_config",
        "PairsConfig",
        "data_builders.pairs",
        "make_pairs",
    ),
    "data closings": Command(
        "forecast what closing the thinking costs, by sampling both ways",
        "data_builders.closings_config",
        "ClosingsConfig",
        "data_builders.closings",
        "closings",
    ),
    "data import": Command(
        "read a corpus: one form, the correct rows, nothing of the benchmarks",
        "data_builders.sources.config",
        "ImportConfig",
        "data_builders.sources.importer",
        "import_corpus",
    ),
    "data inspect": _data("look at problems, traces or training rows", "InspectConfig", "inspect", "inspect"),
    "probes locate": _probes("find the neurons of each failure", "LocateConfig", "attribution.locate"),
    "probes fit": _probes("train the failure detectors", "FitConfig", "detectors.fit"),
    "probes rcn": Command(
        "find the neurons that differ in sign between right and wrong traces",
        "probes.attribution.rcn_config",
        "RcnConfig",
        "probes.attribution.rcn",
        "rcn",
    ),
    "probes directions": Command(
        "make a direction to steer along from two kinds of traces",
        "probes.directions.config",
        "DirectionsConfig",
        "probes.directions.directions",
        "directions",
    ),
    "probes gate": Command(
        "predict from a question alone whether the model will fail it",
        "probes.detectors.gate_config",
        "GateConfig",
        "probes.detectors.gate_stage",
        "gate",
    ),
    "probes fluctuation": Command(
        "do failures show spikes, cycles, collapse? failing against clean, in pairs",
        "probes.fluctuation.config",
        "FluctuationConfig",
        "probes.fluctuation.fluctuation",
        "fluctuation",
    ),
    "probes report": Command(
        "examine the detectors: controls, splits, learning curves",
        "probes.detectors.report_config",
        "ReportConfig",
        "probes.detectors.report",
        "report",
    ),
    "training sft": Command(
        "teach a model its trigger tokens (accelerate launch training/sft.py)",
        "training.sft_config",
        "SftArguments",
        "training.sft",
        "main",
        script="sft.py",
    ),
    "training merge": Command(
        "put a LoRA adapter and its trigger rows into a plain checkpoint",
        "training.tools_config",
        "MergeConfig",
        "training.merge",
        "merge",
    ),
    "training sizing": Command(
        "compute the memory a run needs, by model and launch layout",
        "training.tools_config",
        "SizingConfig",
        "training.sizing",
        "sizing",
    ),
    "training bias": Command(
        "train bias vectors, LoRA or all weights by reinforcement learning, or by SFT",
        "training.bias_config",
        "BiasConfig",
        "training.bias",
        "train_bias",
    ),
    "training bias-table": Command(
        "compare trained arms, the base and controls on held-out problems",
        "training.bias_config",
        "BiasTableConfig",
        "evaluation.bias_table",
        "bias_table",
    ),
    "training logit-lens": Command(
        "which tokens each block's bias vector raises and lowers",
        "training.bias_config",
        "LogitLensConfig",
        "training.logit_lens",
        "logit_lens",
    ),
    "assemble": Command(
        "put model, probes and plan into one steered checkpoint",
        "inference.config",
        "AssembleConfig",
        "inference.steered",
        "assemble",
    ),
    "generate": Command(
        "generate with a steered checkpoint, showing its events",
        "inference.config",
        "GenerateConfig",
        "inference.generate",
        "generate",
    ),
    "inference bake": Command(
        "write a plan's always-on rules into the weights",
        "inference.bake_config",
        "BakeConfig",
        "inference.bake",
        "bake",
    ),
    "inference calibrate": Command(
        "choose a rule's strength by how far it moves the model",
        "inference.calibrate_config",
        "CalibrateConfig",
        "inference.calibrate",
        "calibrate",
    ),
    "choose": Command(
        "choose a plan's rules and thresholds by their worth on validation problems: plan.yaml, frontier.png",
        "evaluation.choose_config",
        "ChooseConfig",
        "evaluation.choose",
        "choose",
    ),
    "evaluate": Command(
        "compare arms on problems: results.json and report.html",
        "evaluation.config",
        "EvaluateConfig",
        "evaluation.evaluate",
        "evaluate",
    ),
    "ablate": Command(
        "steer along a direction and without each of its parts: results.json and results.md",
        "evaluation.ablation_config",
        "AblateConfig",
        "evaluation.ablation",
        "ablate",
    ),
    "combine": Command(
        "switch parts of a plan on together and apart: effects, and whether one explains another",
        "evaluation.combination_config",
        "CombineConfig",
        "evaluation.combination",
        "combine",
    ),
    "evaluation benchmark": Command(
        "write the problems of a benchmark: GSM8K, MATH500, AIME, GPQA, LiveCodeBench, or a file",
        "evaluation.benchmarks.config",
        "BenchmarkConfig",
        "evaluation.benchmarks.benchmark",
        "benchmark",
    ),
    "evaluation compare": Command(
        "compare two evaluations: flipped problems, paired difference, p",
        "evaluation.compare_config",
        "CompareConfig",
        "evaluation.compare",
        "compare_runs",
    ),
    "evaluation show": Command(
        "look at an evaluation in the terminal: arms, filters, traces side by side",
        "evaluation.viewer.config",
        "ShowConfig",
        "evaluation.viewer.terminal",
        "terminal",
    ),
    "evaluation report": Command(
        "write report.html of an evaluation again",
        "evaluation.viewer.config",
        "ReportConfig",
        "evaluation.report",
        "report",
    ),
    "evaluation details": Command(
        "record the neurons of an evaluation's traces, for the report's spectrograms",
        "evaluation.viewer.config",
        "DetailsConfig",
        "evaluation.viewer.details",
        "details",
    ),
    "evaluation runtime": Command(
        "time a checkpoint: plain, watched at the same tokens, and free",
        "evaluation.reproduce.config",
        "RuntimeConfig",
        "evaluation.reproduce.runtime",
        "runtime",
    ),
    "reproduce": Command(
        "a table of the paper: run its recipe, print ours beside the paper's",
        "evaluation.reproduce.config",
        "ReproduceConfig",
        "evaluation.reproduce.reproduce",
        "reproduce",
    ),
    "doctor": Command(
        "say what is installed and whether hooks fire", "floor_config", "DoctorConfig", "doctor", "doctor"
    ),
    "run": Command("run a recipe: a whole chain of stages", "floor_config", "RunConfig", "run", "run_recipe"),
}

GROUPS = {
    "data": "problems, rollouts, judges",
    "probes": "neurons and detectors",
    "training": "teach the triggers",
    "inference": "rules into weights",
    "evaluation": "benchmarks, reports, traces",
}
