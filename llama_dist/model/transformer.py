"""The Llama-like decoder. Parameter names are those of Meta's checkpoints; every family is this one class."""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from llama_dist.config import ModelConfig
from llama_dist.kernels import program as programs
from llama_dist.kernels.attention import compiled_for, paged
from llama_dist.kernels.program import MOST_ON, Call, Chance, Program
from llama_dist.kernels.quantized import compiled
from llama_dist.kernels.single import found_of, likeliest
from llama_dist.kernels.told import sent
from llama_dist.model.attention import Attention
from llama_dist.model.cache import PAGE_SIZE, Batch, KVCache, Laid
from llama_dist.model.norm import RMSNorm
from llama_dist.model.recordings import Record, Recordings, recorder
from llama_dist.model.rope import Rope
from llama_dist.parallel.layers import (
    ColumnParallelLinear,
    FusedColumns,
    OutputLinear,
    Part,
    Placement,
    RowParallelLinear,
    VocabParallelEmbedding,
    gather,
)
from llama_dist.parallel.units import Units
from llama_dist.quant.packed import Packed

INT32, INT64 = 4, 8  # bytes

FIRST = 4  # layers that are recorded by themselves: they run while the launch of the others is made
Stream = tuple[torch.Tensor, ...]
"""The residual stream [n, dim], that normed for the layer that is next, and the angles' cosines and sines."""

MOST = 2048  # rows of a program, as many as a tick has where nothing else is said; what is not used takes no memory


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020), cut by hidden units: w2(silu(w1 x) * w3 x)."""

    def __init__(self, config: ModelConfig, units: Units, part: Part) -> None:
        super().__init__()
        hidden, bias = units.hidden.of(part.rank, part.n_ranks), config.mlp_bias
        self.w1 = ColumnParallelLinear(config.dim, hidden, part, bias=bias)
        self.w2 = RowParallelLinear(units.hidden, config.dim, part, bias=bias)
        self.w3 = ColumnParallelLinear(config.dim, hidden, part, bias=bias)
        self.w13 = FusedColumns(self.w1, self.w3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.w13.gated(x))  # type: ignore[no-any-return]

    def lay(self, program: Program, x: torch.Tensor) -> torch.Tensor:
        """Append it to a program."""
        gate, up = self.w13.lay(program, x, "gate and up")
        gated = program.rows("gated", gate.shape[1])
        program.gate(gate, up, gated)
        return self.w2.lay(program, gated, "feed-forward")


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(self, config: ModelConfig, layer: int, units: Units, part: Part) -> None:
        super().__init__()
        self.attention = Attention(config, layer, units, part)
        self.feed_forward = FeedForward(config, units, part)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps, part)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps, part)

    def forward(
        self,
        x: torch.Tensor,
        normed: torch.Tensor,
        after: RMSNorm,
        batch: Batch,
        angles: Sequence[torch.Tensor],
        cache: KVCache,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The stream x [n, dim], normed for this layer, past it; and that normed by `after`, the next one's norm."""
        x, normed = self.ffn_norm.of_sum(x, self.attention(normed, batch, angles, cache))
        return after.of_sum(x, self.feed_forward(normed))


@dataclass
class LastPass:
    """What a forward pass left for those who ask next. A module is slow to set anything of its own, so it is apart."""

    scored: tuple[torch.Tensor, torch.Tensor] | None = None  # hidden states, and logits computed with them
    parts: tuple[torch.Tensor, torch.Tensor] | None = None  # the same, where logits are this rank's columns still
    likeliest: array[int] | torch.Tensor | None = None  # tokens of these logits, where they are at hand


class Transformer(nn.Module):
    """One rank's part of the model. Weights are left unset.

    Every rank of the model-parallel group must call `forward` and `logits` alike: both reduce or gather.
    """

    def __init__(self, config: ModelConfig, units: Units, part: Part) -> None:
        super().__init__()
        self.config, self.units, self.n_ranks = config, units, part.n_ranks
        self.n_local_kv_heads = units.kv_heads(part.rank, part.n_ranks).padded
        vocab = units.vocab.of(part.rank, part.n_ranks)
        output = OutputLinear(config.dim, vocab, part, bias=False)
        tied = config.tied_embeddings and part.quantization is None  # else rows are looked up as they were
        self.tok_embeddings = VocabParallelEmbedding(vocab, config.dim, part, output if tied else None)
        self.layers = nn.ModuleList(Block(config, layer, units, part) for layer in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps, part)
        self.output = output
        self.rope = Rope(config, part.device)
        self.reproducible = part.reproducible
        self.program: tuple[KVCache, Program] | None = None
        self.recordings: tuple[KVCache, Recordings] | None = None
        self._laid: tuple[KVCache, int] | None = None  # what it was laid out for last
        self._found: array[int] | None = None  # where the program leaves likeliest tokens, if it looks for them
        self._drawn_from: torch.Tensor | None = None  # logits of passes in one call, rows of all ranks' columns
        self._last = LastPass()
        self._views: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by the number of rows, what the program leaves

    def weights(self) -> dict[str, tuple[torch.Tensor | Packed, Placement]]:
        """By its logical name each weight, and the part of the logical tensor that it holds; a shared one once."""
        found: dict[str, tuple[torch.Tensor | Packed, Placement]] = {}
        seen = set()
        for prefix, module in self.named_modules():
            placed = getattr(module, "placements", {})
            held: dict[str, torch.Tensor | Packed] = dict(module.named_parameters(recurse=False))
            if placed and isinstance(module.weight, Packed):
                held["weight"] = module.weight
            for name, weight in held.items():
                if id(weight) not in seen:
                    seen.add(id(weight))
                    found[f"{prefix}.{name}"] = weight, placed.get(name, Placement())
        return found

    @property
    def page_bytes(self) -> int:
        """Bytes of one page of the cache on this rank."""
        config = self.config
        return 2 * config.n_layers * self.n_local_kv_heads * PAGE_SIZE * config.head_dim * self.norm.weight.itemsize

    def new_cache(self, n_pages: int) -> KVCache:
        """A cache for this rank's KV heads, in the weights' dtype."""
        weight = self.norm.weight
        return KVCache(
            self.config.n_layers,
            n_pages,
            self.n_local_kv_heads,
            self.config.head_dim,
            dtype=weight.dtype,
            device=weight.device,
        )

    def lay_out(self, cache: KVCache, max_seq_len: int) -> None:
        """Have batches of few tokens over this cache run in one piece from now on, where the kernels serve.

        On a CPU they are a program of MOST rows, whose bits are those of the layers called one by one. On a GPU passes
        of one token a sequence are recorded.
        """
        weight, self._laid = self.norm.weight, (cache, max_seq_len)
        if weight.device.type == "cuda":
            # Among several ranks steps are not recorded: a collective that is played has no timeout.
            if self.n_ranks == 1 and paged(cache.layers[0][0]) and not self.rope.dynamic:
                self.record(cache, max_seq_len, recorder(weight.device))
            return
        if not (compiled(weight) and programs.compiled() and compiled_for(cache.layers[0])):
            return
        assert isinstance(self.output.weight, Packed), "programs multiply by weights in panels"
        program = Program(MOST, weight.dtype)
        x, normed = program.rows("x", self.config.dim), program.rows("normed", self.config.dim)
        self.tok_embeddings.lay(program, x)
        layers: list[Block] = list(self.layers)  # type: ignore[arg-type]
        norms = self._norms()
        program.norm(x, norms[0].weight, norms[0].eps, normed)
        for layer, after in zip(layers, norms[1:], strict=True):
            y = layer.attention.lay(program, normed, cache)
            program.add_norm(x, y, x, layer.ffn_norm.weight, layer.ffn_norm.eps, normed)
            y = layer.feed_forward.lay(program, normed)
            program.add_norm(x, y, x, after.weight, after.eps, normed)
        program.head()
        logits = program.rows("logits", self.output.output_size_per_partition)
        program.linear(normed, self.output.weight, None, logits)
        self._found, self._drawn_from = self.output.lay_likeliest(program, logits) or (None, None)
        self.program, self._views = (cache, program), {}

    def record(self, cache: KVCache, max_seq_len: int, record: Record) -> None:
        """Have passes of one token a sequence over this cache recorded with `record`, and played, from now on."""
        self.rope.known(max_seq_len)  # recordings read it where it is, and it moves when it grows

        def begin(batch: Batch) -> Stream:
            return self._some_layers(self._begin(batch), slice(FIRST), batch, cache)

        def end(batch: Batch, stream: Stream) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            hidden = self._some_layers(stream, slice(FIRST, None), batch, cache)[1]
            logits = self.logits(hidden)
            return hidden, logits, found_of(logits)

        self.recordings = cache, Recordings(begin, end, record, max_seq_len, self.norm.weight.device)

    def take_sums(self, reproducible: bool) -> None:
        """From now on take sums by unit, or as is the fastest. Every rank of the group calls it alike."""
        self.reproducible = reproducible
        for module in self.modules():
            if isinstance(module, (ColumnParallelLinear, FusedColumns, RowParallelLinear, VocabParallelEmbedding)):
                module.reproducible = reproducible
        if self._laid is not None:
            self.lay_out(*self._laid)

    def forward(
        self, laid: Laid, cache: KVCache, scored: bool = False, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Run the batch's tokens through all layers, writing the cache: the last hidden states, normed, [n, dim].

        They may be overwritten by the next call. `scored`: `logits` of all of them will be asked for, or `greatest`, so
        these may be computed at once. `tokens` [n], on the device: in place of those that were laid, where the host
        does not know them yet.
        """
        self._last.scored = self._last.parts = self._last.likeliest = None
        if self.program is not None and self.program[0] is cache and laid.n <= self.program[1].most:
            return self._run(self.program[1], laid if tokens is None else laid.of(tokens), cache, scored)
        if scored and self.recordings is not None and self.recordings[0] is cache and self.recordings[1].serves(laid):
            hidden, logits, self._last.likeliest = self.recordings[1].run(laid, tokens)
            self._last.scored = hidden, logits
            return hidden
        batch = laid.batch if tokens is None else dataclasses.replace(laid.batch, tokens=tokens)
        hidden = self._some_layers(self._begin(batch), slice(None), batch, cache)[1]
        if scored:
            self._last.scored = hidden, self.logits(hidden)
        return hidden

    def _begin(self, batch: Batch) -> Stream:
        x = self.tok_embeddings(batch.tokens)
        return x, self._norms()[0](x), *self.rope.angles(batch.positions, batch.lengths, batch.stop)

    def _some_layers(self, stream: Stream, which: slice, batch: Batch, cache: KVCache) -> Stream:
        x, normed, *angles = stream
        for layer, after in zip(self.layers[which], self._norms()[1:][which], strict=True):
            x, normed = layer(x, normed, after, batch, angles, cache)
        return x, normed, *angles

    def _norms(self) -> list[RMSNorm]:
        """Each layer's first, and the last one."""
        layers: list[Block] = list(self.layers)  # type: ignore[arg-type]
        return [*(layer.attention_norm for layer in layers), self.norm]

    def goes_on(self, n: int, cache: KVCache) -> bool:
        """Whether `run_on` serves n sequences over this cache."""
        own = self.program
        return own is not None and own[0] is cache and n <= MOST_ON and own[1].goes_on and not self.rope.dynamic

    def run_on(
        self, laid: Laid, cache: KVCache, passes: int, stops: Sequence[int], chances: Sequence[Chance] | None = None
    ) -> list[list[int]]:
        """`forward` up to `passes` times in one call, each time of the tokens found before; these (`Program.run_on`).

        Laid is one token a sequence, with `passes` - 1 ahead, and written over. Of hidden states and logits nothing is
        kept, but for `drawn_from`.
        """
        assert self.program is not None
        self._last.scored = self._last.parts = self._last.likeliest = None
        ahead = laid.stop - max(span.stop for span in laid.spans)
        assert ahead >= passes - 1, f"{passes} passes, pages laid for {ahead + 1}"
        cos, sin = self.rope.known(laid.stop)
        positions = laid.of_tokens.buffer_info()[0] + INT64 * laid.n
        return self.program[1].run_on(self._call(laid, cache, positions, cos, sin), passes, stops, chances)

    def drawn_from(self, row: int) -> torch.Tensor:
        """The logits [vocab] that the last pass of `run_on` with chances drew from."""
        assert self._drawn_from is not None
        return self._drawn_from[row, : self.config.vocab_size]

    def _run(self, program: Program, laid: Laid, cache: KVCache, scored: bool) -> torch.Tensor:
        n, vocab = laid.n, self.config.vocab_size
        if self.rope.dynamic:
            cos, sin = self.rope.angles(laid.batch.positions, laid.batch.lengths, laid.stop)
            held = array("q", range(n))
            rows = held.buffer_info()[0]
        else:
            cos, sin = self.rope.known(laid.stop)
            rows = laid.of_tokens.buffer_info()[0] + INT64 * n  # the positions
        program.run(self._call(laid, cache, rows, cos, sin), scored)
        if n not in self._views:
            parts = program.rows("logits", self.output.output_size_per_partition)[:n]
            self._views[n] = (
                program.rows("normed", self.config.dim)[:n],
                parts[:, :vocab] if self.n_ranks == 1 else parts,
            )
        hidden, logits = self._views[n]
        if scored:
            if self.n_ranks == 1:
                self._last.scored = hidden, logits
            else:
                self._last.parts = hidden, logits
            self._last.likeliest = self._found
        return hidden

    def _call(self, laid: Laid, cache: KVCache, rows: int, cos: torch.Tensor, sin: torch.Tensor) -> Call:
        """What a program is told of them; `rows`: where it stands which of cos and sin each token's are."""
        n, n_spans = laid.n, len(laid.spans)
        tokens, tables = laid.of_tokens.buffer_info()[0], laid.of_spans.buffer_info()[0]
        starts = tables + INT32 * n_spans * laid.width
        slots, counts = tokens + 3 * INT64 * n, starts + INT32 * n_spans
        sizes = (n, n_spans, laid.width, cache.n_pages * PAGE_SIZE, self.config.vocab_size, cos.shape[0])
        return Call(*sizes, tokens, slots, rows, tables, starts, counts, cos.data_ptr(), sin.data_ptr())

    def logits(self, hidden: torch.Tensor, rows: list[int] | None = None) -> torch.Tensor:
        """Hidden states [n, dim] -> logits [n, vocab_size] in the weights' dtype, whole on every rank.

        `rows`: of these only. They may be overwritten by the next call of `forward`.
        """
        some = sent(torch.tensor(rows), hidden.device) if rows is not None else slice(None)
        if self._last.scored is not None and self._last.scored[0] is hidden:
            return self._last.scored[1] if rows is None else self._last.scored[1][some]
        if self._last.parts is not None and self._last.parts[0] is hidden:
            whole = gather(self._last.parts[1][some])[:, : self.config.vocab_size]
            if rows is None:
                self._last.scored = hidden, whole
            return whole
        hidden = hidden[some]
        return gather(self.output(hidden))[:, : self.config.vocab_size]

    def greatest(self, hidden: torch.Tensor) -> list[int] | None:
        """`likeliest` of all logits of the last pass's hidden states, where it is known without these; else None."""
        last = self._last.scored or self._last.parts
        if last is None or last[0] is not hidden or not isinstance(self._last.likeliest, array):
            return None
        return self._last.likeliest[: hidden.shape[0]].tolist()

    def likeliest(self, logits: torch.Tensor) -> list[int]:
        """The likeliest token of each row of what `logits` gave; -1 where a number is not finite."""
        if self._last.likeliest is not None and self._last.scored is not None and self._last.scored[1] is logits:
            return self._last.likeliest[: logits.shape[0]].tolist()
        return likeliest(logits)

    def found(self, logits: torch.Tensor) -> torch.Tensor:
        """The same as int64 [n] on the device, which is not waited for."""
        at_hand = self._last.scored is not None and self._last.scored[1] is logits
        return self._last.likeliest if at_hand and isinstance(self._last.likeliest, torch.Tensor) else found_of(logits)
