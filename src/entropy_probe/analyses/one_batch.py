"""One batch: predict the entropy change of a step from the very rollouts it is taken on, without their shared bias."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from entropy_probe.analyses.admission import draws_of
from entropy_probe.analyses.before import chosen_units
from entropy_probe.analyses.not_modelled import of_frozen_geometry
from entropy_probe.analyses.session import Session, Subject
from entropy_probe.estimators import first_order as fo
from entropy_probe.estimators.baselines import PositionSums
from entropy_probe.estimators.u_statistic import cross_statistic, influence_of_sums
from entropy_probe.gradients.cross import CrossProducts, cross_products
from entropy_probe.gradients.per_sample import unit_backward
from entropy_probe.losses import divides_by_tokens, loss_coefficients
from entropy_probe.named import dot, norm
from entropy_probe.parallel.batch import Part, add_up
from entropy_probe.results.note import NoteKind
from entropy_probe.results.probe import CrossPrompt, ProbeResult
from entropy_probe.rollouts.batch import Rollouts
from entropy_probe.types import TokenCoefficients, TokenScores, Units

__all__ = ["OneBatch"]

MOST_UNITS = 128
"""More prompts than this are put into blocks, unless asked otherwise."""
LEAST_BLOCKS = 16
"""Fewer blocks than this would give a poor standard error; a number of prompts that allows no more is left whole."""
SHARE_FOR_LENGTH, LEAST_FOR_LENGTH = 1 / 16, 8
"""The units, half of them at most, that the change of the mean length is taken from, which multiplies an error only."""
SUSPICIOUS_RATIO = 1e3
"""P should change the scale of the statistic by no more than this."""
LARGE_SCALE = NoteKind(
    "large_scale",
    "the preconditioner scales the product of the mean gradients by {ratio:.3g}: a few elements with tiny second "
    "moments may dominate; lower frozen_max_scale and compare",
    "Lower probe.frozen_max_scale and see whether the number moves.",
)


class OneBatch(Session):
    """One probe of a batch of prompts with a group of responses each."""

    def __init__(self, subject: Subject, batch: Rollouts) -> None:
        super().__init__(subject)
        self.given = batch.cpu()
        batch = self.batch = self.admit(batch, "batch")
        self.prompts = Units.prompts(batch.prompt_ids)
        self.block_size = self._block_size()
        self.units = Units(self.prompts.index // self.block_size, self.prompts.count // self.block_size)
        self.check_ranks_agree(batch=batch)
        self.part = Part.of(batch, self.units, self.units, self.ranks)

    def cross_prompt(self) -> CrossPrompt:
        """The U-statistic alone."""
        found = self.result().cross_prompt
        assert found is not None
        return found

    def result(self) -> ProbeResult:
        """The U-statistic with H and the diagnostics."""
        config, batch = self.config, self.batch
        answered = self.prompts.index[batch.response_mask.any(1)]
        if config.entropy == "surprisal" and bool((answered.bincount(minlength=self.prompts.count) < 2).any()):
            raise ValueError(
                "one batch: expected at least 2 responses per prompt for the surprisal baseline, got a prompt with 1; "
                "sample more, or use entropy='rao_blackwell'"
            )
        with self.isolated():
            self.prepare(batch)
            taps = self.choose_taps(batch)
            scale, report = self.frozen_scale()
            rate = max(self.subject.learning_rates)
            relative = {name: s / rate for name, s in scale.items()}
            part, own = self.part, self.part.select(batch)
            before = self.reference_scores(batch, part, "score batch")
            if self.check_rollouts("batch", before, part, batch).log_weights is not None:
                raise ValueError(
                    "one batch: expected rollouts of the policy itself, got those of another: the update takes them as "
                    "they are, so they cannot be reweighted; predict from two batches"
                )
            mine = self.prompts.select(part.rows)
            by_prompt = add_up(self.ranks, fo.entropy(before, mine, config.normalization, config.entropy))
            positions = add_up(self.ranks, PositionSums.of(before))
            how = (config.normalization, config.entropy, draws_of(batch).select(part.rows))
            towards = fo.entropy_coefficients(before, own.prompt_ids, part.units, positions, *how)
            weights = by_prompt.size.sum().item()
            loss = loss_coefficients(self.given, config.loss_type, config.max_completion_length).select(part.rows)
            left, right = _times(towards, -self.units.count / weights), _times(loss, -float(self.units.count))
            with self.clock.phase("cross-prompt gradients") as progress:
                products = cross_products(
                    self.scorer,
                    self.parameters,
                    own,
                    part.local_units,
                    self.units.count,
                    # mean X = -grad H and mean Y = -grad loss, over units
                    left,
                    right,
                    relative,
                    taps=taps,
                    max_bytes=config.max_stored_gradient_gib * 2**30,
                    progress=progress,
                    ranks=self.ranks,
                )
            slope = self._length_slope(before, positions, right, products.right_total, relative)
        by_unit = part.by_unit(torch.stack([products.left, products.right, products.diagonal]))
        x_side, y_side, diagonal = self.ranks.sum(by_unit)
        statistic = cross_statistic(x_side, y_side, diagonal, self._of_sums(before, slope))
        cross = CrossPrompt(
            delta_h1=-rate * statistic.value,
            se_plugin=rate * statistic.se_plugin,
            se_jackknife=rate * statistic.se_jackknife,
            unit=self.unit,
            u_cross=statistic.value,
            zeta_plugin=statistic.zeta_plugin,
            zeta_jackknife=statistic.zeta_jackknife,
            bars_dot=statistic.bars_dot,
            bars_dot_ratio=self._ratio_to_unscaled(statistic.bars_dot, products),
            diagonal=statistic.diagonal,
            row_means=tuple(statistic.row_means.tolist()),
            num_units=self.units.count,
            mode="exact" if self.block_size == 1 else "block",
            block_size=self.block_size,
            learning_rate=rate,
            gradients=products.how,
            preconditioner=report,
        )
        ascent = {name: g / self.units.count for name, g in products.right_total.items()}
        step = {name: scale[name] * g for name, g in ascent.items()}
        diagnostics = {"gradient_norm": norm(ascent), "clip_factor": 1.0, "step_norm": norm(step)}
        self.not_modelled += of_frozen_geometry(self.parameters, self.optimizer, norm(ascent), config.max_grad_norm)
        return self.assemble(
            by_prompt.ratio(), self.prompts, batch, batch, diagnostics, unit="prompt", cross_prompt=cross
        )

    def _of_sums(self, before: TokenScores, slope: float) -> Callable[[float], Tensor]:
        """What each unit does to the statistic through the batch's sums, from the statistic."""
        config, of_loss = self.config, self.given.response_lengths.double()
        sums = add_up(self.ranks, fo.entropy(before, self.part.units, config.normalization, config.entropy))
        if not divides_by_tokens(config.loss_type):
            of_loss = torch.ones_like(of_loss)
        return lambda value: influence_of_sums(value, sums.size, self.units.total(of_loss), sums.ratio(), slope)

    def _length_slope(
        self,
        before: TokenScores,
        positions: PositionSums,
        right: TokenCoefficients,
        right_total: dict[str, Tensor],
        relative: dict[str, Tensor],
    ) -> float:
        """How the statistic changes per nat of H: some units' length gradients along ``P mean Y`` of all others.

        Args:
            before: scores of this rank's part.
            positions: sums over the whole batch.
            right: coefficients of ``Y``.
            right_total: ``sum Y``.
            relative: P.
        """
        if self.config.normalization != "token":
            return 0.0
        count, part = self.units.count, self.part
        number = min(count // 2, max(LEAST_FOR_LENGTH, round(SHARE_FOR_LENGTH * count)))
        some = chosen_units(self.batch, self.units, number)
        rows = torch.isin(part.units.index, some).nonzero()[:, 0]
        chosen, units = before.select(rows), part.units.select(rows)
        sides = [fo.length_coefficients(chosen, units, positions), right.select(rows)]
        own, present, along = part.select(self.batch).select(rows), units.index.unique().tolist(), 0.0
        with self.clock.phase("length gradient") as progress, self.on_part(part):
            for done, unit in enumerate(present, start=1):
                members = (units.index == unit).nonzero()[:, 0]
                lengths, loss = unit_backward(self.scorer, self.parameters, own, members, sides)
                others = {
                    name: right_total[name] - loss[name] if name in loss else right_total[name] for name in lengths
                }
                along += dot(lengths, {name: relative[name] * y for name, y in others.items()})
                progress(done, len(present))
        tokens = fo.sequence_weights(chosen, "token").sum().item()
        along, tokens = self.ranks.sum(torch.tensor([along, tokens], dtype=torch.float64)).tolist()
        return along / tokens / (count - 1)

    def _block_size(self) -> int:
        """Prompts per unit."""
        count, asked, config = self.prompts.count, self.config.block_size, self.config
        if config.one_batch_units == "exact":
            if asked not in (None, 1):
                raise ValueError(f"block_size: expected 1 or nothing with one_batch_units 'exact', got {asked}")
            return 1
        divisors = [size for size in range(1, count + 1) if count % size == 0]
        if asked is not None:
            if asked > count or count % asked:
                raise ValueError(
                    f"block_size: expected a divisor of the {count} prompts of the batch, got {asked}; use one of "
                    f"{', '.join(map(str, divisors[:-1]))}"
                )
            return asked
        if config.one_batch_units == "auto" and count <= MOST_UNITS:
            return 1
        fitting = [size for size in divisors if size > 1 and LEAST_BLOCKS <= count // size <= MOST_UNITS]
        if not fitting and config.one_batch_units == "block":
            raise ValueError(
                f"one_batch_units 'block': expected a number of prompts that makes {LEAST_BLOCKS} to "
                f"{MOST_UNITS} equal blocks, got {count}; set block_size, or use 'exact'"
            )
        return fitting[0] if fitting else 1

    def _ratio_to_unscaled(self, bars_dot: float, products: CrossProducts) -> float | None:
        unscaled = products.unscaled_total / self.units.count**2
        if unscaled == 0:
            return None
        ratio = bars_dot / unscaled
        if abs(ratio) > SUSPICIOUS_RATIO:
            self.notes.append(LARGE_SCALE(ratio=ratio))
        return ratio


def _times(coefficients: TokenCoefficients, factor: float) -> TokenCoefficients:
    entropies = None if coefficients.entropies is None else factor * coefficients.entropies
    return TokenCoefficients(factor * coefficients.logprobs, entropies)
