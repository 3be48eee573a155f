"""How long a layer takes on a node, looked up fast: tables by whole numbers of tokens and sequences."""

from helixd.plan.cluster.profile import Points, layer_time_s
from helixd.plan.cluster.spec import NodeProfile

# Copying an activation to the device and back off it: bytes/s each way, as the paper's simulator has it.
COPY_S_PER_BYTE = 1 / 4e9 + 1 / 5e9


class Table:
    """Seconds for one layer by batch, filled as far as it was asked. Nothing costs nothing."""

    __slots__ = ("_points", "_values")

    def __init__(self, points: Points) -> None:
        self._points = points
        self._values = [0.0]

    def __call__(self, batch: int) -> float:
        """Seconds for `batch`."""
        values = self._values
        if batch >= len(values):
            values.extend(layer_time_s(self._points, n) for n in range(len(values), batch + 64))
        return values[batch]


class LayerTimes:
    """A node's two tables. Raises ValueError if its layer times were not measured."""

    __slots__ = ("decode", "floor_s", "prompt")

    def __init__(self, profile: NodeProfile) -> None:
        self.prompt = Table(profile.prompt_layer_time_s)
        self.decode = Table(profile.decode_layer_time_s)
        self.floor_s = self.decode(2)

    def paper_layer_s(self, prompt_tokens: int, decodes: int) -> float:
        """A layer of a batch as the paper's simulator has it: a lone decode is charged twice."""
        decode_s = self.decode(decodes)
        return self.prompt(prompt_tokens) + (2 * decode_s if decodes == 1 else decode_s)

    def layer_s(self, prompt_tokens: int, decodes: int) -> float:
        """A layer of a batch: never less than what reading the weights costs, for which two decodes stand."""
        return max(self.floor_s, self.prompt(prompt_tokens) + self.decode(decodes))
