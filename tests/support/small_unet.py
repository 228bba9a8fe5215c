"""A hand-written network with nodes of every family: two resolutions, a skip, self- and cross-attention."""

from __future__ import annotations

from torch import fx

from support.graphs import GraphBuilder, aten

SDPA = aten.scaled_dot_product_attention.default
#: batch, channels, height, width; embedding; prompt.
PICTURE, EMBEDDING, PROMPT = (2, 6, 9, 7), (2, 8), (2, 5, 10)


class Network(GraphBuilder):
    """Blocks over a builder; every parameter is a graph input."""

    def convolution(self, x: fx.Node, out: int, kernel: int = 3, stride: int = 1) -> fx.Node:
        weight = self.parameter(out, x.meta["val"].shape[1], kernel, kernel)
        return self.call(aten.conv2d.default, x, weight, self.parameter(out), [stride] * 2, [kernel // 2] * 2)

    def linear(self, x: fx.Node, out: int) -> fx.Node:
        return self.call(aten.linear.default, x, self.parameter(out, x.meta["val"].shape[-1]), self.parameter(out))

    def norm(self, x: fx.Node, groups: int = 2) -> fx.Node:
        channels = x.meta["val"].shape[1]
        return self.call(aten.group_norm.default, x, groups, self.parameter(channels), self.parameter(channels))

    def residual(self, x: fx.Node, embedding: fx.Node) -> fx.Node:
        """Norm, activation, convolution, shift by the embedding, and the input added."""
        channels = x.meta["val"].shape[1]
        hidden = self.convolution(self.call(aten.silu.default, self.norm(x)), channels)
        shift = self.linear(self.call(aten.silu.default, embedding), channels)
        shift = self.call(aten.unsqueeze.default, self.call(aten.unsqueeze.default, shift, -1), -1)
        return self.call(aten.add.Tensor, x, self.call(aten.add.Tensor, hidden, shift))

    def attention(self, tokens: fx.Node, source: fx.Node, heads: int = 2) -> fx.Node:
        """Attention of tokens [B, S, C] over ``source``, and the tokens added."""
        batch, _, channels = tokens.meta["val"].shape

        def split(value: fx.Node) -> fx.Node:
            projected = self.linear(value, channels)
            shape = [batch, -1, heads, channels // heads]
            return self.call(aten.transpose.int, self.call(aten.reshape.default, projected, shape), 1, 2)

        attended = self.call(SDPA, split(tokens), split(source), split(source))
        joined = self.call(aten.reshape.default, self.call(aten.transpose.int, attended, 1, 2), [batch, -1, channels])
        return self.call(aten.add.Tensor, tokens, self.linear(joined, channels))

    def transformer(self, x: fx.Node, prompt: fx.Node) -> fx.Node:
        """Self-attention, attention to the prompt and a gated feed-forward layer on tokens."""
        batch, channels, height, width = x.meta["val"].shape
        moved = self.call(aten.permute.default, self.norm(x), [0, 2, 3, 1])
        tokens = self.call(aten.reshape.default, moved, [batch, height * width, channels])
        normed = self.call(aten.layer_norm.default, tokens, [channels])
        tokens = self.attention(normed, normed)
        tokens = self.attention(tokens, prompt)
        halves = self.call(aten.chunk.default, self.linear(tokens, 2 * channels), 2, -1)
        gated = self.call(aten.mul.Tensor, self.piece(halves, 0), self.call(aten.gelu.default, self.piece(halves, 1)))
        unflat = self.call(aten.reshape.default, self.linear(gated, channels), [batch, height, width, channels])
        return self.call(aten.add.Tensor, x, self.call(aten.permute.default, unflat, [0, 3, 1, 2]))


def small_unet() -> tuple[Network, fx.Node]:
    """The builder, still open, and its output."""
    network = Network()
    x = network.input(*PICTURE)
    embedding = network.input(*EMBEDDING, name="embedding")
    prompt = network.input(*PROMPT, name="prompt")
    first = network.residual(network.convolution(x, 8), embedding)
    down = network.convolution(first, 8, stride=2)
    middle = network.transformer(network.residual(down, embedding), prompt)
    up = network.call(aten.upsample_nearest2d.vec, middle, [*PICTURE[2:]], None)
    joined = network.call(aten.cat.default, [network.convolution(up, 8), first], 1)
    last = network.residual(network.convolution(joined, 8, kernel=1), embedding)
    return network, network.convolution(network.call(aten.silu.default, network.norm(last)), 4)
