"""Running programs that nobody has read: contained, limited, killed in time, and never in a process of ours."""

from neureasoner.evaluation.sandbox.sandbox import Containment, Limits, Run, Sandbox, Unsafe

__all__ = ["Containment", "Limits", "Run", "Sandbox", "Unsafe"]
