"""Settings of ``training bias``, ``training bias-table`` and ``training logit-lens``. Standard library only."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field

from neureasoner.errors import UserError

ARMS = ("vectors", "lora", "full")
RATES = {"vectors": 1e-3, "lora": 1e-4, "full": 1e-6}
OBJECTIVES = ("rloo", "grpo", "sft")
REWARDS = ("verified", "random")  # or MODULE:FUNCTION
ANSWERS = ("boxed", "tagged")
SCALES = ("none", "group", "batch")
LOSSES = ("dapo", "grpo")
QUESTION = "{question}"
REWARD_HELP = (
    "verified (±1), random (±1 by a coin; the control), or your own as MODULE:FUNCTION, an importable "
    "f(problem, response text, did it end by itself) -> number"
)
_KIND = re.compile(r"[a-z_]+:\d+")


def _one_of(config: object, **known: tuple[str, ...]) -> None:
    for key, values in known.items():
        if getattr(config, key) not in values:
            raise UserError(f"key '{key}' must be one of {', '.join(values)}, got '{getattr(config, key)}'")


def _at_least(config: object, **least: float) -> None:
    for key, bound in least.items():
        if getattr(config, key) < bound:
            raise UserError(f"key '{key}' must be at least {bound}, got {getattr(config, key)}")


def _check_kinds(kinds: list[str]) -> None:
    for kind in kinds:
        if not _KIND.fullmatch(kind):
            raise UserError(f"key 'kinds': '{kind}' is not FAMILY:DIFFICULTY, such as words:4")


def _check_template(key: str, template: str) -> None:
    if QUESTION not in template:
        raise UserError(f"key '{key}' must hold {QUESTION}, where the question goes")


@dataclass
class BiasConfig:
    """Train one vector per block, LoRA or the whole model: by RL on verifiable answers, or by SFT."""

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny'"})
    out: str = field(metadata={"help": "folder for direction/ (vectors) or model/ (lora, full), log.json, curve.png"})
    problems: str = field(default="", metadata={"help": "problem file to train on (rloo, grpo)"})
    traces: str = field(default="", metadata={"help": "traces.jsonl to train on (sft); its right, finished ones count"})
    arm: str = field(default="vectors", metadata={"help": "vectors, lora (on down_proj), or full"})
    objective: str = field(default="rloo", metadata={"help": "rloo (core.md §4.2), grpo, or sft"})
    reward: str = field(default="verified", metadata={"help": REWARD_HELP})
    answer: str = field(default="boxed", metadata={"help": "where the answer stands: boxed, or tagged (<answer>)"})
    template: str = field(default=QUESTION, metadata={"help": "text of the user's turn; {question} is filled in"})
    kinds: list[str] = field(
        default_factory=list, metadata={"help": "use only these FAMILY:DIFFICULTY, such as words:4; none means all"}
    )
    steps: int = field(default=150, metadata={"help": "updates; each has its own fresh samples"})
    prompts: int = field(default=8, metadata={"help": "problems per update, over all devices (published: 128)"})
    samples: int = field(
        default=8, metadata={"help": "responses per problem; a batch of sft is prompts × samples rows"}
    )
    max_new_tokens: int = field(
        default=512, metadata={"help": "cap; a response that reaches it is wrong (published: 4096 or 8192)"}
    )
    temperature: float = field(default=1.0, metadata={"help": "of the samples; top-p is 1"})
    learning_rate: list[float] = field(
        default_factory=list,
        metadata={
            "help": "one, or several to choose from on validation problems; empty = 1e-3 for vectors, 1e-4 for "
            "lora, 1e-6 for full (core.md §4.2)"
        },
    )
    trial_steps: int = field(default=30, metadata={"help": "updates each rate gets before one is chosen"})
    validation: str = field(default="", metadata={"help": "problem file the rate is chosen on; needed for several"})
    validation_samples: int = field(default=2, metadata={"help": "responses per validation problem"})
    rate_of: str = field(default="", metadata={"help": "take the rate chosen by this finished run instead (controls)"})
    warmup: float = field(default=0.03, metadata={"help": "share of the steps; the rate is constant after it"})
    max_grad_norm: float = field(default=2.0, metadata={"help": "clip the gradient's norm"})
    micro_batch: int = field(default=8, metadata={"help": "responses per backward pass and device"})
    lora_rank: int = field(default=4, metadata={"help": "rank of the LoRA arm"})
    lora_alpha: int = field(default=4, metadata={"help": "alpha of the LoRA arm"})
    beta: float = field(default=0.0, metadata={"help": "grpo: weight of the KL to the start (k3)"})
    scale_rewards: str = field(default="none", metadata={"help": "grpo: divide advantages by no, group or batch std"})
    loss_type: str = field(default="dapo", metadata={"help": "grpo: TRL's normalisation; dapo is tokens of the batch"})
    save_steps: int = field(default=10, metadata={"help": "updates between checkpoints"})
    dtype: str = field(
        default="", metadata={"help": "of the weights; empty = float32, on a GPU bfloat16 except for full"}
    )
    device: str = field(default="", metadata={"help": "torch device; empty = GPU if there is one"})
    seed: int = field(default=0, metadata={"help": "seed of the order of problems and of the samples"})

    def __post_init__(self) -> None:
        _one_of(self, arm=ARMS, objective=OBJECTIVES, answer=ANSWERS)
        if ":" not in self.reward:
            _one_of(self, reward=REWARDS)
        _one_of(self, scale_rewards=SCALES, loss_type=LOSSES)
        _at_least(self, steps=1, prompts=1, samples=1, max_new_tokens=1, trial_steps=1, validation_samples=1)
        _at_least(self, micro_batch=1, lora_rank=1, save_steps=1, beta=0, seed=0)
        _check_kinds(self.kinds)
        _check_template("template", self.template)
        wanted = "traces" if self.objective == "sft" else "problems"
        if not getattr(self, wanted):
            raise UserError(f"key '{wanted}' is missing: objective {self.objective} trains on it")
        if self.objective == "sft" and self.template != QUESTION:
            raise UserError("key 'template' has no effect with sft: the traces hold their prompts; leave it out")
        if self.objective != "sft" and self.samples < 2:
            raise UserError(f"key 'samples' must be at least 2 for {self.objective}: the others are the baseline")
        if self.objective != "grpo" and self.beta:
            raise UserError("key 'beta' is for grpo; rloo here has no KL term (core.md §4.2)")
        if self.temperature <= 0:
            raise UserError(f"key 'temperature' must be above 0, got {self.temperature}: greedy samples are all alike")
        if not 0 <= self.warmup < 1:
            raise UserError(f"key 'warmup' is a share and must lie in [0, 1), got {self.warmup}")
        trials = len(set(self.learning_rate)) > 1 and not self.rate_of
        if self.warmup and (self.steps == 1 or (trials and self.trial_steps == 1)):
            key = "steps" if self.steps == 1 else "trial_steps"
            raise UserError(
                f"key '{key}' is 1 and that update is all warmup, at a learning_rate of 0: nothing would be trained; "
                f"raise it, or set warmup to 0"
            )
        if self.max_grad_norm <= 0:
            raise UserError(f"key 'max_grad_norm' must be above 0, got {self.max_grad_norm}")
        self.learning_rate = self.learning_rate or [RATES[self.arm]]
        if not all(0 < rate < math.inf for rate in self.learning_rate):
            raise UserError(f"key 'learning_rate' must hold finite numbers above 0, got {self.learning_rate}")
        if len(set(self.learning_rate)) > 1 and not self.validation and not self.rate_of:
            raise UserError("key 'validation' is missing: several learning rates are chosen from on its problems")
        if len(set(self.learning_rate)) > 1 and self.trial_steps > self.steps:
            raise UserError(f"key 'trial_steps' ({self.trial_steps}) must not exceed 'steps' ({self.steps})")
        if (self.prompts * self.samples) % self.micro_batch:
            raise UserError(
                f"prompts × samples = {self.prompts * self.samples} is no multiple of micro_batch {self.micro_batch}"
            )

    @property
    def rows(self) -> int:
        """Responses (or rows of sft) per update, over all devices."""
        return self.prompts * self.samples


@dataclass
class BiasTableConfig:
    """Compare the base, trained arms and controls on held-out problems, with intervals, sizes and times."""

    model: str = field(metadata={"help": "the base: model folder, hub id, or 'tiny'"})
    problems: str = field(metadata={"help": "held-out problem file"})
    out: str = field(metadata={"help": "folder for results.json, table.md and figures"})
    arms: dict[str, str] = field(metadata={"help": "NAME=FOLDER of each finished `training bias` run"})
    validation: str = field(default="", metadata={"help": "problem file on which the prefix control is chosen"})
    kinds: list[str] = field(default_factory=list, metadata={"help": "use only these FAMILY:DIFFICULTY; none = all"})
    answer: str = field(default="boxed", metadata={"help": "where the answer stands: boxed, or tagged (<answer>)"})
    template: str = field(default=QUESTION, metadata={"help": "text of the user's turn, as in training"})
    control_template: str = field(
        default="", metadata={"help": "another text, for the base alone (template-only control); empty = left out"}
    )
    prefixes: int = field(
        default=0, metadata={"help": "try so many first tokens of the trained vectors on the base alone; 0 = left out"}
    )
    samples: int = field(default=1, metadata={"help": "responses per problem at each temperature above 0"})
    temperatures: list[float] = field(default_factory=lambda: [1.0, 0.0], metadata={"help": "0 is greedy"})
    max_new_tokens: int = field(default=512, metadata={"help": "cap; a response that reaches it is wrong"})
    batch_size: int = field(default=64, metadata={"help": "responses decoded together"})
    limit: int = field(default=0, metadata={"help": "use only the first so many problems of a file; 0 = all"})
    resamples: int = field(default=10_000, metadata={"help": "bootstrap resamples behind each interval"})
    device: str = field(default="", metadata={"help": "torch device; empty = GPU if there is one"})
    seed: int = field(default=0, metadata={"help": "sampling seed, the same in every arm"})

    def __post_init__(self) -> None:
        _one_of(self, answer=ANSWERS)
        _at_least(self, samples=1, max_new_tokens=1, batch_size=1, resamples=1, prefixes=0, limit=0, seed=0)
        _check_kinds(self.kinds)
        _check_template("template", self.template)
        if self.control_template:
            _check_template("control_template", self.control_template)
        if not self.arms:
            raise UserError("key 'arms' is empty: name at least one run, as in vectors=runs/vectors")
        for name in ("base", "template_only", "first_token"):
            if name in self.arms:
                raise UserError(f"key 'arms': the name '{name}' is taken by a control; choose another")
        if not self.temperatures or min(self.temperatures) < 0:
            raise UserError(f"key 'temperatures' must hold numbers from 0 up, got {self.temperatures}")
        if self.prefixes and not self.validation:
            raise UserError("key 'validation' is missing: the prefix is chosen on its problems")


@dataclass
class LogitLensConfig:
    """Which tokens does each block's vector raise and lower? Unembedding times vector, without the final norm."""

    model: str = field(metadata={"help": "the model the vectors were trained on"})
    direction: str = field(metadata={"help": "folder of the direction (residual sites)"})
    out: str = field(metadata={"help": "folder for tokens.json, tokens.md and tokens.png"})
    top: int = field(default=50, metadata={"help": "tokens listed per block, sign and measure"})
    shown: int = field(default=6, metadata={"help": "tokens per block and sign in the figure"})

    def __post_init__(self) -> None:
        _at_least(self, top=1, shown=1)
        if self.shown > self.top:
            raise UserError(f"key 'shown' ({self.shown}) must not exceed 'top' ({self.top})")
