"""How far a run has come: the few numbers that belong to no component."""

from dataclasses import dataclass


@dataclass
class TrainState:
    """Saved in every full checkpoint.

    Attributes:
        step: optimizer steps done.
        tokens_seen: input tokens of all ranks so far.
        nonfinite_steps: steps that were skipped because the loss or a gradient was NaN or infinite.
        lr: learning rate of the last step; not saved, since the schedule knows it.
    """

    step: int = 0
    tokens_seen: int = 0
    nonfinite_steps: int = 0
    lr: float = 0.0

    def state_dict(self) -> dict[str, int]:
        """Plain integers under the names of the fields."""
        return {"step": self.step, "tokens_seen": self.tokens_seen, "nonfinite_steps": self.nonfinite_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take over what `state_dict` gave."""
        self.step = int(state["step"])
        self.tokens_seen = int(state["tokens_seen"])
        self.nonfinite_steps = int(state["nonfinite_steps"])
