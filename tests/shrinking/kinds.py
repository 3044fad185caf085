"""Networks of the kinds that people use: `KINDS`, name → function that gives (net, example)."""

import math

import torch
from torch import nn
from torch.nn import functional as F

KINDS = {}


def kind(build):
    KINDS[build.__name__] = build
    return build


class Forward(nn.Module):
    """Layers by name, and a function of them and the inputs."""

    def __init__(self, function, **layers):
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            if isinstance(layer, nn.Parameter):
                self.register_parameter(name, layer)
            elif isinstance(layer, torch.Tensor):
                self.register_buffer(name, layer)
            else:
                self.add_module(name, layer)

    def forward(self, *inputs):
        return self.function(self, *inputs)


def image(channels=3, side=8):
    return torch.randn(4, channels, side, side)


def weight(*shape):
    return nn.Parameter(0.3 * torch.randn(*shape))


@kind
def inverted_residual():
    def function(net, x):
        h = F.relu6(net.stem(x))
        y = F.relu6(net.n1(net.wide(h)), inplace=True)
        y = F.relu6(net.n2(net.depth(y)))
        h = h + net.n3(net.narrow(y))
        return net.head(h.mean((2, 3)))

    return Forward(
        function,
        stem=nn.Conv2d(3, 8, 3, 2, 1),
        wide=nn.Conv2d(8, 24, 1, bias=False),
        n1=nn.BatchNorm2d(24),
        depth=nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
        n2=nn.BatchNorm2d(24),
        narrow=nn.Conv2d(24, 8, 1, bias=False),
        n3=nn.BatchNorm2d(8),
        head=nn.Linear(8, 5),
    ), image()


@kind
def squeeze_and_excitation():
    def function(net, x):
        h = F.silu(net.c(x))
        gate = torch.sigmoid(net.up(F.silu(net.down(F.adaptive_avg_pool2d(h, 1)))))
        return net.head((h * gate).mean((2, 3)))

    return Forward(
        function, c=nn.Conv2d(3, 16, 3), down=nn.Conv2d(16, 4, 1), up=nn.Conv2d(4, 16, 1),
        head=nn.Linear(16, 5),
    ), image()  # fmt: skip


@kind
def transposed_convolutions_and_skips():
    def function(net, x):
        a = torch.relu(net.a(x))
        b = torch.relu(net.b(F.max_pool2d(a, 2)))
        up = torch.cat([net.up(b), a], 1)
        return net.out(torch.relu(net.c(up)))

    return Forward(
        function, a=nn.Conv2d(1, 6, 3, padding=1), b=nn.Conv2d(6, 12, 3, padding=1),
        up=nn.ConvTranspose2d(12, 6, 2, 2), c=nn.Conv2d(12, 6, 3, padding=1),
        out=nn.Conv2d(6, 1, 1),
    ), image(1)  # fmt: skip


@kind
def grouped_transposed_convolution():
    def function(net, x):
        return net.out(torch.tanh(net.up(torch.relu(net.c(x)))))

    return Forward(
        function, c=nn.Conv1d(2, 8, 3), up=nn.ConvTranspose1d(8, 12, 2, 2, groups=4, bias=False),
        out=nn.Conv1d(12, 3, 1),
    ), torch.randn(4, 2, 9)  # fmt: skip


@kind
def volumes():
    def function(net, x):
        h = F.avg_pool3d(torch.relu(net.n(net.a(x))), 2)
        return net.out(net.up(h).flatten(1))

    return Forward(
        function, a=nn.Conv3d(1, 6, 3, padding=1), n=nn.BatchNorm3d(6),
        up=nn.ConvTranspose3d(6, 2, 2, 2), out=nn.Linear(2 * 64, 3),
    ), torch.randn(4, 1, 4, 4, 4)  # fmt: skip


@kind
def dense_blocks():
    def function(net, x):
        h = net.stem(x)
        for norm, conv in ((net.n1, net.c1), (net.n2, net.c2)):
            h = torch.cat([h, conv(torch.relu(norm(h)))], 1)
        return net.head(F.adaptive_avg_pool2d(net.n3(h), 1).flatten(1))

    return Forward(
        function, stem=nn.Conv2d(3, 6, 3), n1=nn.BatchNorm2d(6),
        c1=nn.Conv2d(6, 4, 3, padding=1, bias=False), n2=nn.BatchNorm2d(10),
        c2=nn.Conv2d(10, 4, 3, padding=1, bias=False), n3=nn.BatchNorm2d(14), head=nn.Linear(14, 5),
    ), image()  # fmt: skip


@kind
def grouped_bottleneck():
    def function(net, x):
        h = torch.relu(net.stem(x))
        y = torch.relu(net.n1(net.c1(h)))
        y = torch.relu(net.n2(net.c2(y)))
        y = net.c3(y)
        y += h
        return net.head(torch.relu_(y).mean((2, 3)))

    return Forward(
        function, stem=nn.Conv2d(3, 12, 3), c1=nn.Conv2d(12, 16, 1), n1=nn.BatchNorm2d(16),
        c2=nn.Conv2d(16, 16, 3, padding=1, groups=4), n2=nn.BatchNorm2d(16),
        c3=nn.Conv2d(16, 12, 1), head=nn.Linear(12, 5),
    ), image()  # fmt: skip


@kind
def causal_convolutions():
    def function(net, x):
        h = torch.relu(net.a(x)[:, :, :-2].contiguous())
        h = torch.relu(net.b(F.pad(h, (4, 0))) + net.skip(x))
        return net.head(h[:, :, -1])

    return Forward(
        function, a=nn.Conv1d(2, 10, 3, padding=2), b=nn.Conv1d(10, 10, 3, dilation=2),
        skip=nn.Conv1d(2, 10, 1), head=nn.Linear(10, 4),
    ), torch.randn(4, 2, 12)  # fmt: skip


@kind
def gated_linear_units():
    def function(net, x):
        return net.out(F.glu(net.b(F.glu(net.a(x), 1)), -1))

    return Forward(
        function, a=nn.Linear(6, 24), b=nn.Linear(12, 20), out=nn.Linear(10, 4)
    ), torch.randn(4, 6)


@kind
def maxout_and_highway():
    def function(net, x):
        h = net.a(x).view(x.shape[0], 8, 3).amax(-1)
        gate = torch.sigmoid(net.gate(h))
        return net.out(gate * torch.tanh(net.b(h)) + (1 - gate) * h)

    return Forward(
        function, a=nn.Linear(6, 24), b=nn.Linear(8, 8), gate=nn.Linear(8, 8), out=nn.Linear(8, 4)
    ), torch.randn(4, 6)


@kind
def feature_wise_modulation():
    def function(net, x, z):
        h = torch.relu(net.a(x))
        scale, shift = net.film(z).chunk(2, -1)
        return net.out(torch.relu(h * (1 + scale) - shift))

    return Forward(function, a=nn.Linear(6, 12), film=nn.Linear(4, 24), out=nn.Linear(12, 4)), (
        torch.randn(4, 6),
        torch.randn(4, 4),
    )


class RMS(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.gain


def rotated(x):
    length, width = x.shape[-2:]
    angle = torch.arange(length)[:, None] * 100.0 ** (-torch.arange(0, width, 2) / width)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


def half_rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class Decoder(nn.Module):
    """RMSNorm written out, rotated queries and keys, fused projections and a gated MLP."""

    def __init__(self, width=16, heads=4, wide=20):
        super().__init__()
        self.n1, self.n2, self.heads = RMS(width), RMS(width), heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * wide, bias=False), nn.Linear(wide, width)

    def forward(self, x):
        rows, length, width = x.shape
        qkv = self.qkv(self.n1(x)).view(rows, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(rotated(q), rotated(k), v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(rows, length, width))
        a, b = self.up(self.n2(x)).chunk(2, -1)
        return x + self.down(F.silu(a) * b)


@kind
def decoder():
    return nn.Sequential(nn.Embedding(20, 16), Decoder(), Decoder(), RMS(16), nn.Linear(16, 20)), (
        torch.randint(0, 20, (4, 6))
    )


class Grouped(nn.Module):
    """Attention with fewer heads of keys and values than of queries."""

    def __init__(self, repeated):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(12, n) for n in (24, 12, 12))
        self.out, self.norm, self.repeated = nn.Linear(24, 12), nn.LayerNorm(12), repeated
        angle = torch.arange(5)[:, None] * 10.0 ** (-torch.arange(3) / 3)
        self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], -1))
        self.register_buffer("sin", torch.cat([angle.sin(), angle.sin()], -1))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).unflatten(-1, (-1, 6)).transpose(1, 2) for f in (self.q, self.k, self.v))
        q, k = (half_rotated(t, self.cos, self.sin) for t in (q, k))
        if self.repeated:
            k, v = (
                t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(t.shape[0], 4, *t.shape[2:])
                for t in (k, v)
            )
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=not self.repeated)
        return x + self.out(y.transpose(1, 2).flatten(2))


@kind
def grouped_heads():
    return nn.Sequential(Grouped(True), Grouped(True), nn.Flatten(), nn.Linear(60, 4)), (
        torch.randn(4, 5, 12)
    )


@kind
def grouped_heads_of_torch():
    return nn.Sequential(Grouped(False), nn.Flatten(), nn.Linear(60, 4)), torch.randn(4, 5, 12)


class Written(nn.Module):
    """Attention in matrix products, with a causal mask in a buffer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("mask", torch.tril(torch.ones(6, 6)).view(1, 1, 6, 6))
        self.norm = nn.LayerNorm(16)

    def forward(self, x):
        rows, length, width = x.size()
        q, k, v = self.qkv(self.norm(x)).split(16, dim=2)
        q, k, v = (t.view(rows, length, 4, 4).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        scores = scores.masked_fill(self.mask[:, :, :length, :length] == 0, float("-inf"))
        y = F.softmax(scores, -1) @ v
        return x + self.out(y.transpose(1, 2).contiguous().view(rows, length, width))


@kind
def written_attention():
    def function(net, x):
        h = net.tokens(x) + net.places(torch.arange(0, x.shape[1]))
        return net.out(net.b(net.a(h)))[:, -1]

    return Forward(
        function, tokens=nn.Embedding(20, 16), places=nn.Embedding(6, 16), a=Written(), b=Written(),
        out=nn.Linear(16, 20, bias=False),
    ), torch.randint(0, 20, (4, 6))  # fmt: skip


@kind
def masked_layers_of_torch():
    def function(net, x, mask):
        h = net.encoder(net.i(x), src_key_padding_mask=mask)
        y, _ = net.cross(net.queries.expand(x.shape[0], -1, -1), h, h, key_padding_mask=mask)
        return net.out(y.flatten(1))

    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0)
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[:, -1] = True
    return Forward(
        function, i=nn.Linear(6, 12), encoder=nn.TransformerEncoder(layer, 2),
        cross=nn.MultiheadAttention(12, 3, batch_first=True), queries=weight(1, 2, 12),
        out=nn.Linear(24, 4),
    ), (torch.randn(4, 5, 6), mask)  # fmt: skip


@kind
def encoder_and_decoder():
    def function(net, x):
        h = net.i(x)
        mask = nn.Transformer.generate_square_subsequent_mask(3, dtype=x.dtype)
        return net.out(net.t(h, h[:, :3], tgt_mask=mask).mean(1))

    return Forward(
        function, i=nn.Linear(6, 12),
        t=nn.Transformer(12, 3, 1, 1, 20, batch_first=True, dropout=0.0), out=nn.Linear(12, 4),
    ), torch.randn(4, 5, 6)  # fmt: skip


@kind
def windows():
    def function(net, x):
        h = net.patch(x).permute(0, 2, 3, 1)
        h = torch.roll(h, (-1, -1), (1, 2))
        rows, height, width, c = h.shape
        h = h.view(rows, height // 2, 2, width // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        h = h.reshape(-1, 4, c)
        q, k, v = net.qkv(h).reshape(-1, 4, 3, 2, 6).permute(2, 0, 3, 1, 4)
        bias = net.table[net.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        scores = (q * 6**-0.5) @ k.transpose(-2, -1) + bias.unsqueeze(0)
        y = net.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(-1, 4, c))
        y = y.view(rows, height // 2, width // 2, 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        return net.head(y.reshape(rows, height * width, c).mean(1))

    return Forward(
        function, patch=nn.Conv2d(3, 12, 2, 2), qkv=nn.Linear(12, 36), out=nn.Linear(12, 12),
        table=weight(9, 2), index=torch.randint(0, 9, (4, 4)), head=nn.Linear(12, 4),
    ), image()  # fmt: skip


@kind
def layer_scale():
    def function(net, x):
        h = net.stem(x)
        y = net.norm(net.depth(h).permute(0, 2, 3, 1))
        y = net.gain * net.p2(F.gelu(net.p1(y)))
        return net.head((h + y.permute(0, 3, 1, 2)).mean((-2, -1)))

    return Forward(
        function, stem=nn.Conv2d(3, 8, 2, 2), depth=nn.Conv2d(8, 8, 3, padding=1, groups=8),
        norm=nn.LayerNorm(8), p1=nn.Linear(8, 32), p2=nn.Linear(32, 8), gain=weight(8),
        head=nn.Linear(8, 5),
    ), image()  # fmt: skip


@kind
def one_dict():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 10), nn.Linear(4, 10), nn.Linear(20, 3)

        def forward(self, batch):
            h = torch.cat([self.a(batch["x"]), self.b(batch["z"])], -1)
            return {"mean": self.out(torch.relu(h)), "rest": (h.sum(1), [batch["z"]])}

    return Net(), {"x": torch.randn(4, 6), "z": torch.randn(4, 4)}


@kind
def named_inputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.out = nn.Linear(6, 10), nn.Embedding(9, 10), nn.Linear(10, 3)

        def forward(self, z=None, x=None, flag=False):
            return self.out(torch.tanh(self.a(x)) - self.b(z))

    return Net(), {"x": torch.randn(4, 6), "z": torch.randint(0, 9, (4,))}


@kind
def twins():
    def function(net, x):
        a, b = net.encoder(x[:, 0]), net.encoder(x[:, 1])
        return net.out(torch.cat([(a - b).abs(), a * b], -1))

    encoder = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
    return Forward(function, encoder=encoder, out=nn.Linear(16, 3)), torch.randn(4, 2, 6)


@kind
def pixel_shuffle():
    def function(net, x):
        return F.pixel_shuffle(net.b(torch.relu(net.a(x))), 2) + F.interpolate(x, scale_factor=2)

    return Forward(
        function, a=nn.Conv2d(1, 12, 3, padding=1), b=nn.Conv2d(12, 4, 3, padding=1)
    ), image(1, 5)


@kind
def slopes_and_ceilings():
    return nn.Sequential(
        nn.Conv2d(3, 10, 3), nn.PReLU(10), nn.MaxPool2d(2, 2, ceil_mode=True), nn.Conv2d(10, 6, 2),
        nn.PReLU(), nn.LocalResponseNorm(3), nn.Flatten(), nn.Linear(24, 4),
    ), image()  # fmt: skip


@kind
def norms_over_pixels():
    return nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.ReLU(), nn.Conv2d(12, 8, 3),
        nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.AdaptiveMaxPool2d(2), nn.Flatten(),
        nn.Linear(32, 4),
    ), image()  # fmt: skip


@kind
def einstein_sums():
    def function(net, x):
        h = torch.relu(torch.einsum("bnf,fk->bnk", x, net.w) + net.b)
        h = torch.einsum("mn,bnk->bmk", net.graph, h)
        return torch.einsum("bmk,ok->bmo", torch.tanh(h), net.v).sum(1)

    return Forward(
        function, w=weight(6, 12), b=weight(12), v=weight(3, 12),
        graph=torch.softmax(torch.randn(5, 5), 1),
    ), torch.randn(4, 5, 6)  # fmt: skip


@kind
def an_ensemble_in_one_product():
    def function(net, x):
        h = torch.relu(torch.bmm(x[None].expand(3, -1, -1), net.w) + net.b)
        return torch.baddbmm(net.c, h, net.v).mean(0)

    return Forward(
        function, w=weight(3, 6, 10), b=weight(3, 1, 10), v=weight(3, 10, 4), c=weight(3, 1, 4)
    ), torch.randn(4, 6)


@kind
def bags_of_embeddings():
    def function(net, x):
        h = torch.cat([net.bag(x), net.a(x[:, 0]), net.b(x[:, 1:]).mean(1)], -1)
        return net.out(torch.relu(net.h(h)))

    return Forward(
        function, bag=nn.EmbeddingBag(20, 8, mode="sum"), a=nn.Embedding(20, 8),
        b=nn.Embedding(20, 6), h=nn.Linear(22, 10), out=nn.Linear(10, 3),
    ), torch.randint(0, 20, (4, 5))  # fmt: skip


@kind
def tied_weights():
    def function(net, x):
        h = net.tokens(x)
        return F.linear(h + net.b(F.gelu(net.a(h))), net.tokens.weight)

    return Forward(
        function, tokens=nn.Embedding(20, 10), a=nn.Linear(10, 24), b=nn.Linear(24, 10)
    ), torch.randint(0, 20, (4, 5))


@kind
def bilinear():
    def function(net, x):
        h = torch.relu(net.a(x))
        return net.out(torch.relu(net.b(h, net.c(x))))

    return Forward(
        function, a=nn.Linear(6, 8), c=nn.Linear(6, 5), b=nn.Bilinear(8, 5, 7), out=nn.Linear(7, 3)
    ), torch.randn(4, 6)


@kind
def recurrent():
    def function(net, x):
        y, (h, _) = net.lstm(torch.tanh(net.i(x)))
        return net.out(torch.relu(net.b(torch.cat([y[:, -1], h[0]], -1))))

    return Forward(
        function, i=nn.Linear(5, 8), lstm=nn.LSTM(8, 6, batch_first=True, bidirectional=True),
        b=nn.Linear(18, 10), out=nn.Linear(10, 3),
    ), torch.randn(4, 7, 5)  # fmt: skip


@kind
def statistics_over_time():
    def function(net, x):
        h = torch.relu(net.c(x))
        return F.normalize(net.out(torch.cat([h.mean(-1), h.std(-1)], 1)), dim=-1)

    return Forward(function, c=nn.Conv1d(4, 12, 3), out=nn.Linear(24, 6)), torch.randn(4, 4, 10)


@kind
def shuffled_channels():
    def function(net, x):
        a, b = net.stem(x).chunk(2, 1)
        y = torch.cat([a, torch.relu(net.p(torch.relu(net.depth(b))))], 1)
        return net.out(nn.functional.channel_shuffle(y, 2).mean((2, 3)))

    return Forward(
        function, stem=nn.Conv2d(3, 12, 1), depth=nn.Conv2d(6, 6, 3, padding=1, groups=6),
        p=nn.Conv2d(6, 6, 1), out=nn.Linear(12, 4),
    ), image(3, 5)  # fmt: skip


@kind
def soft_experts():
    def function(net, x):
        gates = torch.softmax(net.gate(x), -1)
        answers = torch.stack([net.b0(torch.relu(net.a0(x))), net.b1(torch.relu(net.a1(x)))], 1)
        return net.out((gates.unsqueeze(-1) * answers).sum(1))

    return Forward(
        function, gate=nn.Linear(6, 2), a0=nn.Linear(6, 10), b0=nn.Linear(10, 8),
        a1=nn.Linear(6, 10), b1=nn.Linear(10, 8), out=nn.Linear(8, 3),
    ), torch.randn(4, 6)  # fmt: skip


@kind
def patches():
    def function(net, x):
        h = F.unfold(torch.relu(net.c(x)), 2, stride=2).transpose(1, 2)
        return net.out(torch.relu(net.a(h)).amax(1))

    return Forward(
        function, c=nn.Conv2d(1, 6, 3), a=nn.Linear(24, 10), out=nn.Linear(10, 3)
    ), image(1)


@kind
def fourier_layers():
    def function(net, x):
        h = net.i(x).transpose(1, 2)
        f = torch.fft.rfft(h)
        f = torch.complex(f.real * net.w.unsqueeze(-1), f.imag)
        return net.out((torch.fft.irfft(f, n=h.shape[-1]) + net.c(h)).mean(-1))

    return Forward(
        function, i=nn.Linear(2, 8), w=weight(8), c=nn.Conv1d(8, 8, 1), out=nn.Linear(8, 3)
    ), torch.randn(4, 16, 2)


@kind
def a_layer_in_a_loop():
    def function(net, x):
        h = torch.tanh(net.a(x))
        for _ in range(3):
            h = h + torch.tanh(net.b(h))
        return net.out(h)

    return Forward(
        function, a=nn.Linear(6, 12), b=nn.Linear(12, 12), out=nn.Linear(12, 3)
    ), torch.randn(4, 6)


@kind
def tokens_of_features():
    def function(net, x):
        t = x[:, :, None] * net.w + net.b
        t = torch.cat([net.cls.expand(x.size(0), 1, -1), t], 1)
        return net.out(net.e(t)[:, 0])

    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True, dropout=0.0, norm_first=True)
    return Forward(
        function, w=weight(6, 12), b=weight(6, 12), cls=weight(12), e=layer, out=nn.Linear(12, 3)
    ), torch.randn(4, 6)


@kind
def heads_for_several_tasks():
    def function(net, x):
        h = torch.relu(net.trunk(x))
        return net.a(h), {"class": net.b(h).softmax(-1), "scale": F.softplus(net.c(h))}

    return Forward(
        function, trunk=nn.Linear(6, 16), a=nn.Linear(16, 2), b=nn.Linear(16, 4), c=nn.Linear(16, 1)
    ), torch.randn(4, 6)
