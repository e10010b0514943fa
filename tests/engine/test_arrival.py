"""A prefill right after a wake reads no weight before it is there, whatever order the model has registered them in.

The arena here is host memory from which the weights have gone; ``hold_back`` brings in just the bytes that it is asked
for. So each wait is as short as it can be, and what is read too early is NaN.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from torch.nn import Module

from prism_sgl.allocator.vmm_host import HostArena
from prism_sgl.allocator.weights import Layout
from prism_sgl.engine.arrival import Arrival
from prism_sgl.engine.device import HostDevice
from prism_sgl.engine.tensors import move_storage, weight_storages

WIDTH = 16
IDS = torch.tensor([3, 9, 27])
IMAGE = torch.linspace(-1.0, 1.0, 3 * WIDTH).view(3, WIDTH)
STREAM = 7


def linear() -> torch.nn.Linear:
    return torch.nn.Linear(WIDTH, WIDTH, bias=False)


def norm() -> torch.nn.LayerNorm:
    return torch.nn.LayerNorm(WIDTH)


class Layer(Module):
    def __init__(self, number: int) -> None:
        super().__init__()
        self.attention = RadixAttention(1, WIDTH, 1.0, 1, number)
        self.up, self.norm = linear(), norm()

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.up(self.norm(hidden))


class Decoder(Module):
    """As llama.py: embedding, layers, norm."""

    def __init__(self, num_layers: int = 3) -> None:
        super().__init__()
        self.embed_tokens = torch.nn.Embedding(50, WIDTH)
        self.layers = torch.nn.ModuleList(Layer(number) for number in range(num_layers))
        self.norm = norm()

    def forward(self, seen: torch.Tensor) -> torch.Tensor:
        hidden = self.embed_tokens(IDS) + seen
        for layer in self.layers:
            hidden = layer(hidden)
        return self.norm(hidden)


class Tower(Module):
    """As the one of qwen2_5_vl.py: a patch embedding that is read outside of its module, blocks, a merger."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__()
        self.patch_embed = linear()
        self.blocks = torch.nn.ModuleList(linear() for _ in range(num_blocks))
        self.merger = linear()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden = image @ self.patch_embed.weight.T
        for block in self.blocks:
            hidden = block(hidden)
        return self.merger(hidden)


class Model(Module):
    """Parts in the order in which they are registered. The head is read outside of its module, as SGLang does."""

    def __init__(self, **parts: Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def head(self) -> torch.Tensor:
        return self.lm_head.weight

    def forward(self, image: torch.Tensor | None) -> torch.Tensor:
        seen = torch.zeros(3, WIDTH) if image is None else self.visual(image)
        return self.model(seen) @ self.head().T


def head() -> torch.nn.Linear:
    return torch.nn.Linear(WIDTH, 50, bias=False)


def plain() -> Model:
    return Model(model=Decoder(), lm_head=head())


def tied() -> Model:
    """The head is the embedding itself."""
    model = Decoder()
    return Model(model=model, lm_head=model.embed_tokens)


def tied_weight() -> Model:
    """Two modules, one parameter."""
    made = plain()
    made.lm_head.weight = made.model.embed_tokens.weight
    return made


def head_first() -> Model:
    return Model(lm_head=head(), model=Decoder())


def tower_before(num_blocks: int = 2) -> Model:
    """As glm4v.py."""
    return Model(visual=Tower(num_blocks), model=Decoder(), lm_head=head())


def larger_tower_before() -> Model:
    return tower_before(5)


def tower_after(num_blocks: int = 2) -> Model:
    """As qwen2_5_vl.py."""
    return Model(model=Decoder(), lm_head=head(), visual=Tower(num_blocks))


def larger_tower_after() -> Model:
    return tower_after(5)


class BareTower(Module):
    """Nothing follows its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList(linear() for _ in range(5))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            image = block(image)
        return image


def larger_tower_before_the_head() -> Model:
    """Waiting at the tower's blocks would be waiting for the head, with images only."""
    return Model(model=Decoder(), visual=BareTower(), lm_head=head())


def projector_after() -> Model:
    """As mllama.py: the tower stands before the layers, what brings its output to them behind."""

    class WithProjector(Model):
        def forward(self, image: torch.Tensor | None) -> torch.Tensor:
            return super().forward(None if image is None else image @ self.multi_modal_projector.weight.T)

    return WithProjector(visual=Tower(2), model=Decoder(), lm_head=head(), multi_modal_projector=linear())


def projection_beside_the_layers() -> Model:
    """As gemma3n_causal.py: registered behind the layers, read before them."""

    class Projecting(Decoder):
        def __init__(self) -> None:
            super().__init__()
            self.per_layer_model_projection = linear()

        def forward(self, seen: torch.Tensor) -> torch.Tensor:
            return super().forward(seen + IMAGE @ self.per_layer_model_projection.weight.T)

    return Model(model=Projecting(), lm_head=head())


def embedding_behind_the_layers() -> Model:
    """The head is known to be read last, but it is the embedding too."""

    class Late(Decoder):
        def __init__(self) -> None:
            super().__init__()
            embedding = self.embed_tokens
            del self.embed_tokens
            self.embed_tokens = embedding

    model = Late()
    return Model(model=model, lm_head=model.embed_tokens)


def storage_of_head_read_first() -> Model:
    """A parameter of its own that looks into the head's storage."""

    class Sharing(Model):
        def forward(self, image: torch.Tensor | None) -> torch.Tensor:
            early = self.other.weight.sum()
            return super().forward(image) + early

    made = Sharing(model=Decoder(), lm_head=head(), other=Module())
    made.other.weight = torch.nn.Parameter(made.lm_head.weight.data[:2])
    return made


def several_heads() -> Model:
    """A second list, which nobody calls: it is not for the layers."""

    class Heads(Model):
        def head(self) -> torch.Tensor:
            return torch.cat([head.weight for head in self.lm_heads])

    return Heads(model=Decoder(), lm_heads=torch.nn.ModuleList(linear() for _ in range(5)))


def no_list() -> Model:
    model = plain()
    model.model.layers = torch.nn.Sequential(*model.model.layers)
    return model


LAYER_BY_LAYER = [plain, tied, tied_weight, head_first, tower_before, larger_tower_before]
ALL_AT_ONCE = [
    tower_after,
    larger_tower_after,
    larger_tower_before_the_head,
    projector_after,
    projection_beside_the_layers,
    embedding_behind_the_layers,
    storage_of_head_read_first,
    several_heads,
    no_list,
]


class LateArena(HostArena):
    """After ``leave`` only what is waited for comes back."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__("unit:weights", -(-size_bytes // 4096), 4096)
        self.map([range(self.num_pages)])
        self.waits: list[int] = []
        self._image = b""
        self._there = self.size_bytes

    def leave(self) -> None:
        image = bytearray(self.size_bytes)
        self.copy_out(0, memoryview(image))
        self._image = bytes(image)
        self._there = 0
        self.copy_in(0, memoryview(b"\xff" * self.size_bytes))  # NaN as float32

    def hold_back(self, stream: int, end: int) -> None:
        assert stream == STREAM
        self.waits.append(end)
        self._bring(end)

    def settle(self) -> None:
        self._bring(self.size_bytes)

    def is_settled(self) -> bool:
        return self._there == self.size_bytes

    def _bring(self, end: int) -> None:
        self._there = max(self._there, end)
        self.copy_in(0, memoryview(self._image)[:end])


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=STREAM))


@pytest.fixture
def hold() -> Iterator[Callable[[Module], LateArena]]:
    """Moves a model's weights into an arena, as weights_loading.py does."""
    arenas: list[LateArena] = []

    def move(model: Module) -> LateArena:
        groups = weight_storages(model)
        layout = Layout.plan([group.nbytes for group in groups])
        arena = LateArena(layout.total_bytes)
        arenas.append(arena)
        for group, offset in zip(groups, layout.offsets, strict=True):
            move_storage(group, HostDevice().bytes_at(arena.base + offset, group.nbytes))
        return arena

    yield move
    for arena in arenas:
        arena.close()


@pytest.mark.parametrize("make", LAYER_BY_LAYER + ALL_AT_ONCE)
@pytest.mark.parametrize("image", [None, IMAGE], ids=["text", "image"])
@torch.no_grad()
def test_pass_after_wake_reads_nothing_too_early(
    make: Callable[[], Model], image: torch.Tensor | None, hold: Callable[[Module], LateArena]
) -> None:
    torch.manual_seed(0)
    model = make()
    if not hasattr(model, "visual"):
        image = None
    arena = hold(model)
    arrival = Arrival(model, arena)
    awake = model(image)
    assert not awake.isnan().any()
    for eager in (True, False):
        arena.leave()
        arrival.begin()
        arrival.before_pass(eager=eager)
        assert torch.equal(model(image), awake)
        arrival.wait()
        assert not arrival.under_way


@pytest.mark.parametrize("make", LAYER_BY_LAYER)
def test_each_layer_waits_for_its_own_bytes(
    make: Callable[[], Model], hold: Callable[[Module], LateArena]
) -> None:
    model = make()
    arena = hold(model)
    arrival = Arrival(model, arena)
    arena.leave()
    arrival.begin()
    arrival.before_pass(eager=True)
    layers = list(model.model.layers)
    first = min(parameter.data_ptr() for parameter in layers[0].parameters()) - arena.base
    assert arena.waits == [first]
    arena.waits.clear()
    for layer in layers:
        layer(IMAGE)
    ends = [
        max(parameter.data_ptr() + parameter.nbytes for parameter in layer.parameters()) - arena.base
        for layer in layers
    ]
    # The norm and the head are read outside of modules that could wait, so the last layer waits for them.
    assert arena.waits == [*ends[:-1], arena.size_bytes]
    assert first < ends[0] < ends[1] < arena.size_bytes
    arena.waits.clear()
    arrival.before_pass(eager=False)
    assert arena.waits == [arena.size_bytes]


@pytest.mark.parametrize("make", ALL_AT_ONCE)
def test_pass_waits_for_everything_where_the_order_of_reads_is_not_known(
    make: Callable[[], Model], hold: Callable[[Module], LateArena], caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    arena = hold(model)
    with caplog.at_level(logging.INFO):
        arrival = Arrival(model, arena)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "after a wake, prefills wait for all weights"
    ]
    arena.leave()
    arrival.begin()
    arrival.before_pass(eager=True)
    assert arena.waits == [arena.size_bytes]
    # Everything is there: no hook waits again.
    for layer in model.model.layers:
        layer(IMAGE)
    if hasattr(model, "visual"):
        model.visual(IMAGE)
    assert arena.waits == [arena.size_bytes]


def test_start_names_what_is_in_the_way(
    hold: Callable[[Module], LateArena], caplog: pytest.LogCaptureFixture
) -> None:
    model = tower_after()
    with caplog.at_level(logging.INFO):
        Arrival(model, hold(model))
    assert "visual.patch_embed.weight follows the first layer" in caplog.text


def test_plain_decoder_says_nothing(
    hold: Callable[[Module], LateArena], caplog: pytest.LogCaptureFixture
) -> None:
    model = plain()
    with caplog.at_level(logging.INFO):
        Arrival(model, hold(model))
    assert not caplog.records
