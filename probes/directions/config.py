"""Settings of ``probes directions``. Standard library only, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field

from neureasoner.errors import UserError
from neureasoner.probes.config import check_shares

CONTRASTS = {"correct": "mean", "short": "last", "thoughts": "boundary"}  # and where each is read by default
POOLS = ("mean", "last", "boundary")
ESTIMATORS = ("mean", "pca", "relative")
LENGTHS = ("natural", "unit")
# How a thought begins (^) or what it contains, of either case (SEAL; related.md A1).
REFLECTION = (
    *("^Wait", "verify", "make sure", "hold on", "think again", "'s correct", "'s incorrect"),
    *("let me check", "seems right"),
)
TRANSITION = (
    *("^Alternatively", "think differently", "another way", "another approach", "another method"),
    *("another solution", "another strategy", "another technique"),
)


@dataclass
class DirectionsConfig:
    """Make a direction to steer along from the difference between two kinds of traces, or of thoughts."""

    model: str = field(metadata={"help": "model folder, hub id, or 'tiny'"})
    traces: str = field(metadata={"help": "judged traces.jsonl, several a problem (for thoughts, unjudged will do)"})
    out: str = field(metadata={"help": "folder to write direction.safetensors and direction.json into"})
    sites: list[str] = field(
        default_factory=lambda: ["residual:*"],
        metadata={
            "help": "where to read, and later add: residual:20, mlp_out:*, head:3[0,2], neuron:* (* = every block)"
        },
    )
    contrast: str = field(
        default="correct",
        metadata={
            "help": "the two sides: 'correct' right - wrong traces; 'short' the shortest - the longest right answer to "
            "the same problem (ASC); 'thoughts' execution - reflection and transition (SEAL)"
        },
    )
    pool: str = field(
        default="",
        metadata={
            "help": "state of a trace: 'mean' of the response, its 'last' token, or the 'boundary' tokens between "
            "thoughts; empty is what the contrast is known for"
        },
    )
    estimator: str = field(
        default="mean",
        metadata={
            "help": "'mean' difference; 'pca', the first axis of the differences within problems; 'relative', the "
            "neurons of the released AdaRAS ranking"
        },
    )
    paired: bool | None = field(
        default=None,
        metadata={
            "help": "true: differences within each problem, then averaged; false: over all states alike; none: true, "
            "but false for thoughts, as SEAL, and for 'relative'"
        },
    )
    top_k: int = field(default=50, metadata={"help": "neurons kept by 'relative', over all blocks together"})
    remove: list[str] = field(
        default_factory=list, metadata={"help": "direction folders whose vectors are projected out of this one"}
    )
    length: str = field(
        default="natural", metadata={"help": "'natural': as long as the sides differ; 'unit': length 1 at every site"}
    )
    reflection: list[str] = field(
        default_factory=lambda: list(REFLECTION),
        metadata={"help": "what a reflection contains, or begins with (^)", "split": False},
    )
    transition: list[str] = field(
        default_factory=lambda: list(TRANSITION),
        metadata={"help": "what a transition contains, or begins with (^)", "split": False},
    )
    retokenise: bool = field(
        default=False,
        metadata={"help": "read problem and response as text, with this model's tokenizer (traces of another model)"},
    )
    template: bool = field(
        default=True, metadata={"help": "with retokenise: the model's chat template, or else plain text with headings"}
    )
    source_model: str = field(
        default="", metadata={"help": "the model that wrote the traces, for the record; empty is the model itself"}
    )
    problems: int = field(default=0, metadata={"help": "use at most so many training problems; 0 means all"})
    least_problems: int = field(default=8, metadata={"help": "fewest problems (or states of a side) to go on with"})
    batch_size: int = field(default=8, metadata={"help": "sequences read at once"})
    validation: float = field(
        default=0.2, metadata={"help": "share of problems on which the direction is checked, as in probes fit"}
    )
    test: float = field(default=0.2, metadata={"help": "share of problems left alone, as in probes fit"})
    seed: int = field(default=0, metadata={"help": "seed of the split (as in probes fit) and of the problems used"})

    def __post_init__(self) -> None:
        for key, known in (("contrast", CONTRASTS), ("estimator", ESTIMATORS), ("length", LENGTHS)):
            if getattr(self, key) not in known:
                raise UserError(f"key '{key}' must be one of {', '.join(known)}, got '{getattr(self, key)}'")
        if self.pool and self.pool not in POOLS:
            raise UserError(f"key 'pool' must be one of {', '.join(POOLS)}, or empty, got '{self.pool}'")
        if ((self.pool or CONTRASTS[self.contrast]) == "boundary") != (self.contrast == "thoughts"):
            raise UserError("key 'pool': 'boundary' belongs to the contrast 'thoughts', and that one to it")
        if not self.sites:
            raise UserError("key 'sites' is empty; name one at least, such as residual:3")
        for key, least in (("top_k", 1), ("batch_size", 1), ("problems", 0), ("least_problems", 2)):
            if getattr(self, key) < least:
                raise UserError(f"key '{key}' must be at least {least}, got {getattr(self, key)}")
        if self.estimator == "pca" and self.paired is False:
            raise UserError("key 'paired' must be true for the estimator 'pca': its rows are differences in a problem")
        if self.estimator == "relative" and (self.remove or self.length == "unit" or self.paired):
            raise UserError("keys 'remove', 'length' and 'paired' belong to the estimators 'mean' and 'pca'")
        if self.contrast == "thoughts" and not (self.reflection or self.transition):
            raise UserError("keys 'reflection' and 'transition' are both empty, so every thought would be execution")
        if not self.template and not self.retokenise:
            raise UserError("key 'template' has an effect only with retokenise; otherwise the traces' prompts decide")
        check_shares(self.validation, self.test)
