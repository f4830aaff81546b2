"""Break the engines and the tests' tools one line at a time: the tests must notice every time.

    python tests/mutants.py [words]        mutants whose description or file holds every word

A mutant lives in a copy of the repository; one that survives is a hole in the tests. Engines are
put to the quick tests, each tool to its own.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
TERMS, SWEEPS = "kernels/_divergence_terms.py", "kernels/_divergence_sweeps.py"
TILES, LAUNCHES = "kernels/_tiles.py", "kernels/divergence.py"
PORTABLE, SMALL = "fastkd/portable/divergence.py", "fastkd/portable/_small_divergence.py"
LOSSES = "fastkd/divergence.py"
PAIRS, RELATIONS = "kernels/_relational_tiles.py", "kernels/relational.py"
PORTABLE_RELATIONS, RELATIONAL = "fastkd/portable/relational.py", "fastkd/relational.py"
GROUP = "fastkd/_distributed.py"
CORRELATIONS, CORRELATION = "fastkd/portable/correlation.py", "fastkd/correlation.py"
METER, GUARD, INTERPRETER = "tests/meter.py", "tests/guard.py", "tests/interpreter.py"
GATE, SASS = "tests/gate.py", "tests/sass.py"
COUNTS, BUDGETS = "tests/counts.py", "tests/budgets.py"
FLOOR = "benchmarks/floor.py"


@dataclass(frozen=True)
class Mutant:
    file: str
    operator: str  # what kind of mistake
    old: str  # must be in the file once, or `place` times counting from 1
    new: str
    place: int = 1

    def __str__(self) -> str:
        return f"{self.operator}: {' '.join(self.old.split())} → {' '.join(self.new.split())}"

    def apply(self, root: Path) -> None:
        path = root / self.file.replace("kernels/", "fastkd/kernels/", 1)
        parts = path.read_text().split(self.old)
        if len(parts) <= self.place:
            raise SystemExit(f"{self.file} no longer has {self.old!r}: renew the table of mutants")
        before, after = self.old.join(parts[: self.place]), self.old.join(parts[self.place :])
        path.write_text(before + self.new + after)


MUTANTS = [
    # the sums of the KLs
    Mutant(TERMS, "sign flipped", "et * (dt - ds), 0.0)", "et * (ds - dt), 0.0)"),
    Mutant(TERMS, "sign flipped", "es * (ds - dt), 0.0)", "es * (dt - ds), 0.0)"),
    Mutant(TERMS, "sign flipped", "et * -ds, 0.0)", "et * ds, 0.0)"),
    Mutant(TERMS, "mask dropped", "tl.where(et > 0, et * (dt - ds), 0.0)", "et * (dt - ds)"),
    Mutant(TERMS, "mask dropped", "tl.where(es > 0, es * (ds - dt), 0.0)", "es * (ds - dt)"),
    Mutant(TERMS, "mask dropped", "tl.where(et > 0, et * -ds, 0.0)", "et * -ds"),
    Mutant(TERMS, "term dropped", "(a + zt * (rise_s - rise_t))", "(a + zt * rise_s)"),
    Mutant(TERMS, "term dropped", "(a + zt * rise_s) * shrink_t", "a * shrink_t"),
    Mutant(TERMS, "term dropped", "(b + zs * (rise_t - rise_s))", "b"),
    Mutant(TERMS, "rescaling dropped", "(rise_s - rise_t)) * shrink_t", "(rise_s - rise_t))"),
    Mutant(TERMS, "rescaling dropped", "(rise_t - rise_s)) * shrink_s", "(rise_t - rise_s))"),
    Mutant(TERMS, "rescaling dropped", "zs = zs * shrink_s +", "zs = zs +"),
    Mutant(TERMS, "rescaling dropped", "zt = zt * shrink_t +", "zt = zt +"),
    Mutant(TERMS, "rescaling dropped", "z1 = z1 * tl.exp2(m1 - top_1) +", "z1 = z1 +"),
    Mutant(TERMS, "rescaling dropped", "tl.sum(zs * shrink_s, 0)", "tl.sum(zs, 0)"),
    Mutant(TERMS, "rescaling dropped", "tl.sum(zt * shrink_t, 0)", "tl.sum(zt, 0)"),
    Mutant(TERMS, "rescaling dropped", "tl.sum(z1 * tl.exp2(m1 - top_1), 0)", "tl.sum(z1, 0)"),
    Mutant(TERMS, "pivot dropped", "tl.maximum(ms, tl.max(x, 1) * cs)", "ms * 0"),
    Mutant(TERMS, "statistics swapped", "return top_s, zs, top_t, zt,", "return top_s, zt, top_t, zs,"),
    Mutant(TERMS, "statistics swapped", "value = a / zt - ratio", "value = a / zs - ratio"),
    Mutant(TERMS, "sign flipped", "value = a / zt - ratio", "value = a / zt + ratio"),
    Mutant(TERMS, "sign flipped", "value = b / zs + ratio", "value = b / zs - ratio"),
    Mutant(TERMS, "term dropped", "value = a / zt + tl.log2(zs)", "value = a / zt"),
    Mutant(TERMS, "term dropped", "weight * (a / zt - ratio) +", "(a / zt - ratio) +"),
    Mutant(TERMS, "unit dropped", "return value * LN2, b / zs", "return value, b / zs"),
    Mutant(TERMS, "statistics swapped", "LN2, b / zs", "LN2, b / zt"),
    # the mixtures
    Mutant(TERMS, "sign flipped", "tl.where(q > p, 0.5, tl.where(q < p, -0.5", "tl.where(q > p, -0.5, tl.where(q < p, 0.5"),
    Mutant(TERMS, "term dropped", "0.5 * tl.abs(p - q)", "tl.abs(p - q)"),
    Mutant(TERMS, "mask dropped", "tl.maximum(ds + ratio, SMALLEST)", "ds + ratio"),
    Mutant(TERMS, "mask dropped", "tl.maximum(dt, SMALLEST)", "dt"),
    Mutant(TERMS, "term dropped", "ds + ratio, SMALLEST", "ds, SMALLEST"),
    Mutant(TERMS, "weights swapped", "of_teacher, of_student = 1 - weight, weight", "pass"),
    Mutant(TERMS, "term dropped", "+ of_student * q", "+ q"),
    Mutant(TERMS, "sign flipped", "q, (weight - 1) * share", "q, (1 - weight) * share"),
    Mutant(TERMS, "unit dropped", "p * (log_p - log_m) * LN2", "p * (log_p - log_m)"),
    Mutant(TERMS, "term dropped", "above - weight * share", "above"),
    Mutant(TERMS, "term dropped", "(weight * LN2) + q * above", "(weight * LN2)"),
    # the slopes
    Mutant(TERMS, "sign flipped", "return tl.exp2(ds) * (1 / zs) - tl.exp2(dt)", "return tl.exp2(ds) * (1 / zs) + tl.exp2(dt)"),
    Mutant(TERMS, "term dropped", "((ds - dt) - slope_sum) * LN2", "(ds - dt) * LN2"),
    Mutant(TERMS, "mask dropped", "tl.where(q <= TINY, 0.0, q * ((ds - dt) - slope_sum) * LN2)", "q * ((ds - dt) - slope_sum) * LN2"),
    Mutant(TERMS, "term dropped", "(1 - weight) * reverse + weight * (q", "reverse + weight * (q"),
    Mutant(TERMS, "term dropped", "q * (v - slope_sum))", "q * v)"),
    Mutant(TERMS, "mask dropped", "(1 + 0 * ratio) / zt", "1 / zt"),
    Mutant(SWEEPS, "mask dropped", "(1 + 0 * ratio) / zt", "1 / zt"),
    Mutant(SWEEPS, "mask dropped", "(1 + 0 * ratio) / zt", "1 / zt", 2),
    Mutant(TERMS, "label dropped", "(tl.log2(z1) - tl.fma(x, c1, -m1))", "(tl.log2(z1) + m1)"),
    Mutant(TERMS, "mask dropped", "tl.where(label < 0, 0.0, (tl", "tl.where(label < -9, 0.0, (tl"),
    # the sweeps
    Mutant(SWEEPS, "tail dropped", "if rest < last:", "if rest > last:"),
    Mutant(SWEEPS, "tail dropped", "if rest < last:", "if rest > last:", 2),
    Mutant(SWEEPS, "tail dropped", "(thread == 1) & (end + k < n_cols - head)", "(thread == 1) & (k < 0)"),
    Mutant(SWEEPS, "head dropped", "(thread == 0) & (k < head)", "(thread == 0) & (k < 0)"),
    Mutant(SWEEPS, "off by one", "(end + k < n_cols - head)", "(end + k < n_cols - head - 1)"),
    Mutant(SWEEPS, "off by one", "(first == 0) & (n_cols % WIDTH + head > 0)", "(n_cols % WIDTH + head > 0)"),
    Mutant(SWEEPS, "off by one", "(first == 0) & (n_cols % WIDTH + head > 0)", "(n_cols % WIDTH + head > 0)", 2),
    Mutant(SWEEPS, "mask dropped", "k - head, end + k", "k, end + k"),
    Mutant(SWEEPS, "statistics swapped", "ms, zs = tl.load(statistics_row), tl.load(statistics_row + 1)", "ms, zs = tl.load(statistics_row + 2), tl.load(statistics_row + 3)"),
    Mutant(SWEEPS, "statistics swapped", "ms, zs = tl.load(statistics_row), tl.load(statistics_row + 1)", "ms, zs = tl.load(statistics_row + 2), tl.load(statistics_row + 3)", 2),
    Mutant(SWEEPS, "T² dropped", "tl.where(counts, value * number(scale, ON_DEVICE, DTYPE), 0.0)", "tl.where(counts, value, 0.0)"),
    Mutant(SWEEPS, "T² dropped", "tl.where(counts, value * scale, 0.0)", "tl.where(counts, value, 0.0)"),
    Mutant(SWEEPS, "T² dropped", "tl.where(counts, value * scale, 0.0)", "tl.where(counts, value, 0.0)", 2),
    Mutant(SWEEPS, "mask dropped", "tl.store(losses_ptr + row, tl.where(counts, value * scale, 0.0))", "tl.store(losses_ptr + row, value * scale)"),
    Mutant(SWEEPS, "wrong row", "(row.to(tl.int64) * n_splits + split) * N_STATISTICS", "split * N_STATISTICS"),
    Mutant(SWEEPS, "split dropped", "(split < n_splits) & (counts", "(split < 1) & (counts"),
    Mutant(SWEEPS, "split dropped", "first = split * vectors_per_split", "first = split * 0"),
    Mutant(SWEEPS, "term dropped", "number(scale, ON_DEVICE, DTYPE) / temperature, DTYPE", "number(scale, ON_DEVICE, DTYPE), DTYPE"),
    Mutant(SWEEPS, "term dropped", "ce_upstream_stride, scale / temperature, DTYPE", "ce_upstream_stride, scale, DTYPE"),
    Mutant(SWEEPS, "gradient zero", "tl.where(factor == 0, 0.0, by_log_q * factor)", "by_log_q * 0"),
    Mutant(SWEEPS, "mask dropped", "tl.where(factor == 0, 0.0, by_log_q * factor)", "by_log_q * factor"),
    Mutant(SWEEPS, "label dropped", "- tl.where(columns == label, 1.0, 0.0)", ""),
    Mutant(SWEEPS, "off by one", "columns == label, 1.0", "columns == label + 1, 1.0"),
    Mutant(SWEEPS, "mask dropped", "tl.where(ce_factor == 0, 0.0, distance * ce_factor)", "distance * ce_factor"),
    Mutant(SWEEPS, "label dropped", "gradient += tl.where(ce_factor", "gradient += 0 * tl.where(ce_factor"),
    Mutant(SWEEPS, "label dropped", "ce_factor = tl.where(label < 0, 0.0, upstream)", "ce_factor = upstream"),
    Mutant(SWEEPS, "mask dropped", "factor = tl.where(tl.load(keep_ptr + rows, mask, 0) != 0, factor, 0.0)", "factor = factor"),
    Mutant(SWEEPS, "wrong stride", "upstream_ptr + rows * upstream_stride", "upstream_ptr + rows"),
    Mutant(SWEEPS, "wrong row", "row, block = program // n_blocks, program % n_blocks", "row, block = program * 0, program % n_blocks"),
    Mutant(SWEEPS, "block dropped", "first = block * VECTORS", "first = block * 0"),
    Mutant(SWEEPS, "mask dropped", "columns < n_cols)", "columns < n_cols - 1)"),
    Mutant(SWEEPS, "statistics swapped", "zs, zt = tl.sum(es, 1), tl.sum(et, 1)", "zt, zs = tl.sum(es, 1), tl.sum(et, 1)"),
    Mutant(SWEEPS, "wrong temperature", "ct = log2_units(number(teacher_temperature", "ct = log2_units(number(student_temperature"),
    Mutant(SWEEPS, "wrong temperature", "ct = log2_units(number(teacher_temperature", "ct = log2_units(number(student_temperature", 2),
    Mutant(SWEEPS, "wrong temperature", "ct = log2_units(number(teacher_temperature", "ct = log2_units(number(student_temperature", 3),
    Mutant(SWEEPS, "sign flipped", "y -= tl.load(offset_row", "y += tl.load(offset_row"),
    Mutant(SWEEPS, "mask dropped", "tl.where(counts, value * scale, 0.0), exists", "value * scale, exists"),
    Mutant(TILES, "wrong stride", "(row - outer * inner).to(tl.int64) * inner_stride", "(row - outer * inner).to(tl.int64) * outer_stride"),
    Mutant(TILES, "wrong stride", "outer.to(tl.int64) * outer_stride", "outer.to(tl.int64) * inner_stride"),
    Mutant(TILES, "unit dropped", "(tl.int64) // size % WIDTH", "(tl.int64) % WIDTH"),
    Mutant(LAUNCHES, "off by one", "_whole_rows(problem, None, None, gradient", "_whole_rows(problem, None, None, 0 * gradient"),
    Mutant(LAUNCHES, "wrong stride", "teacher_inner=teacher.inner_stride", "teacher_inner=student.inner_stride"),
    Mutant(LAUNCHES, "wrong stride", "teacher_outer=teacher.outer_stride", "teacher_outer=student.outer_stride"),
    # the portable engine
    Mutant(PORTABLE, "sign flipped", "(_mean(p.d.sub_(q.d), p) - ratio)", "(_mean(q.d.sub_(p.d), p) - ratio)"),
    Mutant(PORTABLE, "sign flipped", "(_mean(q.d.sub_(p.d), q) + ratio)", "(_mean(p.d.sub_(q.d), q) + ratio)"),
    Mutant(PORTABLE, "term dropped", "(_mean(p.d.sub_(q.d), p) - ratio)", "_mean(p.d.sub_(q.d), p)"),
    Mutant(PORTABLE, "term dropped", "(_mean(q.d.sub_(p.d), q) + ratio)", "_mean(q.d.sub_(p.d), q)"),
    Mutant(PORTABLE, "sign flipped", "(q.total.log2() - _mean(q.d, p))", "(q.total.log2() + _mean(q.d, p))"),
    Mutant(PORTABLE, "mask dropped", "x.mul_(weights.e).nansum(", "x.mul_(weights.e).sum("),
    Mutant(PORTABLE, "term dropped", ".nansum(-1, keepdim=True).div_(weights.total)", ".nansum(-1, keepdim=True)"),
    Mutant(PORTABLE, "weights swapped", "(of_p - ratio) * weight + (ratio - of_q) * (1 - weight)", "(of_p - ratio) * (1 - weight) + (ratio - of_q) * weight"),
    Mutant(PORTABLE, "term dropped", ".mul_(0.5 * scale)", ".mul_(scale)"),
    Mutant(PORTABLE, "T² dropped", "unit = _LN2 * scale", "unit = _LN2"),
    Mutant(PORTABLE, "T² dropped", "factors = factors * scale / temperature", "factors = factors / temperature"),
    Mutant(PORTABLE, "term dropped", "factors = factors * scale / temperature", "factors = factors * scale"),
    Mutant(PORTABLE, "mask dropped", "nothing = ratio * 0", "nothing = 0"),
    Mutant(PORTABLE, "mask dropped", "factor = ratio * 0 + factor", "factor = factor"),
    Mutant(PORTABLE, "term dropped", "of_p * weight + of_q * (1 - weight) + nothing", "of_p * weight + nothing"),
    Mutant(SMALL, "weights swapped", "        q, p = p, q\n    if", "        pass\n    if"),
    Mutant(PORTABLE, "term dropped", "q.d.add_(ratio)", "q.d.add_(0)"),
    Mutant(PORTABLE, "mask dropped", "m.clamp_(min=torch.finfo(m.dtype).tiny)", "m"),
    Mutant(PORTABLE, "label dropped", "(q.total.log2() - q.d.gather", "(q.total.log2() - 0 * q.d.gather"),
    Mutant(PORTABLE, "mask dropped", "losses.masked_fill_(~keep, 0)", "pass"),
    Mutant(PORTABLE, "mask dropped", "cross_entropies.masked_fill_(labels < 0, 0)", "pass"),
    Mutant(PORTABLE, "gradient zero", "_slope(name, p, q, weight, factors[rows], scratch[4], slope)", "slope.zero_()"),
    Mutant(PORTABLE, "mask dropped", "            _select(slope, factors[rows])", "            pass"),
    Mutant(PORTABLE, "label dropped", "slope.scatter_add_(1, classes, -factor)", "pass"),
    Mutant(PORTABLE, "sign flipped", "slope.scatter_add_(1, classes, -factor)", "slope.scatter_add_(1, classes, factor)"),
    Mutant(PORTABLE, "sign flipped", "out.sub_(p.e.mul_(factor / p.total))", "out.add_(p.e.mul_(factor / p.total))"),
    Mutant(PORTABLE, "sign flipped", "torch.sub(q.e, p.e, out=q.d).sign_()", "torch.sub(p.e, q.e, out=q.d).sign_()"),
    Mutant(PORTABLE, "sign flipped", "v, unit = p.e.div_(m), weight - 1", "v, unit = p.e.div_(m), 1 - weight"),
    Mutant(PORTABLE, "term dropped", "nan_to_num_(0).add_(of_m)", "nan_to_num_(0)"),
    Mutant(PORTABLE, "term dropped", "torch.mul(v.sub_(mean), q.e, out=out)", "torch.mul(v, q.e, out=out)"),
    Mutant(PORTABLE, "term dropped", ".sub_(p.e.mul_(factor / p.total * weight))", ""),
    Mutant(PORTABLE, "statistics swapped", "out.mul_(factor / q.total * unit)", "out.mul_(factor / p.total * unit)"),
    Mutant(PORTABLE, "off by one", "stop = min(start + size, inner)", "stop = min(start + size, inner - 1)"),
    Mutant(PORTABLE, "wrong row", "rows = slice(i * inner + start, i * inner + stop)", "rows = slice(start, stop)"),
    Mutant(PORTABLE, "sign flipped", "torch.sub(logits.to(dtype), offset, out=d)", "torch.add(logits.to(dtype), offset, out=d)"),
    Mutant(PORTABLE, "wrong temperature", "_softmax(z_teacher, dtype, teacher_temperature,", "_softmax(z_teacher, dtype, temperature,"),
    Mutant(PORTABLE, "wrong temperature", "_softmax(z_teacher, dtype, teacher_temperature,", "_softmax(z_teacher, dtype, temperature,", 2),
    # its short way for few logits
    Mutant(SMALL, "sign flipped", "above = q.d.sub_(p.d)", "above = p.d.sub_(q.d)"),
    Mutant(SMALL, "statistics swapped", "    ratio = p.total / q.total", "    ratio = q.total / p.total"),
    Mutant(SMALL, "term dropped", "p.d.sub_(q.d).mul_(p.e), p).sub_(log_ratio)", "p.d.sub_(q.d).mul_(p.e), p)"),
    Mutant(SMALL, "term dropped", "q.total.log2().sub_(_mean(q.d.mul_(p.e), p))", "_mean(q.d.mul_(p.e), p).neg_()"),
    Mutant(SMALL, "term dropped", "reverse = of_q + log_ratio", "reverse = of_q * 1"),
    Mutant(SMALL, "term dropped", "reverse = of_q + log_ratio", "reverse = of_q * 1", 2),
    Mutant(SMALL, "term dropped", "(above.sub_(of_q).mul_(q.e), _LN2, q.total)", "(above.mul_(q.e), _LN2, q.total)"),
    Mutant(SMALL, "term dropped", "(above.sub_(of_q).mul_(q.e), _LN2 * (1", "(above.mul_(q.e), _LN2 * (1"),
    Mutant(SMALL, "term dropped", ".add_(share)", ""),
    Mutant(SMALL, "term dropped", "entries.sub_(p.e.mul_(ratio.reciprocal_()), alpha=share), unit", "entries, unit"),
    Mutant(SMALL, "sign flipped", "p).add_(log_ratio).neg_()", "p).add_(log_ratio)"),
    Mutant(SMALL, "weights swapped", "torch.lerp(reverse, forward, weight)", "torch.lerp(forward, reverse, weight)"),
    Mutant(SMALL, "gradient zero", "sub_(p.e), 1.0, p.total", "sub_(p.e), 0.0, p.total"),
    Mutant(SMALL, "rescaling dropped", "q.e.mul_(p.total / q.total).sub_(p.e)", "q.e.sub_(p.e)"),
    Mutant(SMALL, "rescaling dropped", "    q.e.mul_(ratio)", "    pass"),
    Mutant(SMALL, "weights swapped", "q, p, weight = p, q, 1 - weight", "q, p, weight = p, q, weight"),
    Mutant(SMALL, "mask dropped", "torch.where(counts, factor, 0)", "factor"),
    Mutant(SMALL, "sign flipped", "q, p, m), weight - 1", "q, p, m), 1 - weight"),
    Mutant(SMALL, "term dropped", "above.sub_(torch.div(q.e, m, out=m), alpha=weight / _LN2)", "pass"),
    Mutant(SMALL, "weights swapped", "torch.lerp(reverse, _mean(p.d.sub_(log_m).mul_(p.e), p), weight)", "torch.lerp(reverse, _mean(p.d.sub_(log_m).mul_(p.e), p), 1 - weight)"),
    Mutant(SMALL, "term dropped", "v.sub_(_mean(torch.mul(v, q.e, out=scratch), p)).mul_(q.e)", "v.mul_(q.e)"),
    Mutant(SMALL, "term dropped", "sum(-1, keepdim=True).div_(of.total)", "sum(-1, keepdim=True)"),
    Mutant(SMALL, "sign flipped", "_centred(difference.sign_(), q", "_centred(difference.sign_().neg_(), q"),
    Mutant(SMALL, "term dropped", ".mul_(0.5 / _LN2)", ".mul_(1 / _LN2)"),
    Mutant(SMALL, "T² dropped", "bits.mul_(_LN2 * scale)", "bits.mul_(_LN2)"),
    Mutant(SMALL, "T² dropped", "slope, scale / temperature, counts", "slope, 1 / temperature, counts"),
    Mutant(SMALL, "term dropped", "slope, scale / temperature, counts", "slope, scale, counts"),
    Mutant(SMALL, "wrong temperature", "unit = 1 / (_LN2 * temperature)", "unit = 1 / _LN2"),
    Mutant(SMALL, "wrong temperature", "_cross_entropy(q.d * temperature, ", "_cross_entropy(q.d * 1, "),
    Mutant(SMALL, "mask dropped", "        _zeroed(losses, counts)", "        pass"),
    Mutant(SMALL, "mask dropped", "entries if self.counts is None else _zeroed(entries, self.counts)", "entries"),
    Mutant(SMALL, "mask dropped", "counts = None if all_count else labels >= 0", "counts = None if all_count else labels >= -9"),
    Mutant(SMALL, "mask dropped", "if math.isfinite(total.item()) else None", "if True else None"),
    Mutant(SMALL, "mask dropped", "if all(math.isfinite(term.losses.sum().item()) for term in terms):", "if True:"),
    Mutant(SMALL, "label dropped", ".sub_(d.gather(-1, classes))", ""),
    Mutant(SMALL, "sign flipped", "classes, total.neg())", "classes, total)"),
    Mutant(SMALL, "label dropped", "gradient = product if gradient is None else gradient + product", "gradient = product if gradient is None else gradient"),
    Mutant(SMALL, "label dropped", "slopes = [functools.reduce(Tensor.add_, slopes)]", "slopes = slopes[:1]"),
    Mutant(SMALL, "gradient zero", "product = slope * (", "product = 0 * slope * ("),
    Mutant(SMALL, "term dropped", "if torch.is_grad_enabled() and gradient is not None:", "if False:"),
    # what calls the engines
    Mutant(LOSSES, "weights swapped", "(1 - alpha) * scale / divisor, alpha / divisor", "alpha * scale / divisor, (1 - alpha) / divisor"),
    Mutant(LOSSES, "mask dropped", "if not math.isfinite(loss.item()):", "if False:"),
    Mutant(LOSSES, "T² dropped", "scale = scale / temperature**2", "pass"),
    Mutant(LOSSES, "term dropped", "scale = student.shape[:-1].numel() / divisor", "scale = 1.0"),
    Mutant("fastkd/_loss.py", "term dropped", "normalizer is None else normalizer or 1.0", "normalizer is None else 1.0"),
    Mutant(LOSSES, "T² dropped", "scale = temperature**2 if scale_t2 else 1.0", "scale = 1.0"),
    Mutant(LOSSES, "mask dropped", "labels = labels.masked_fill(~counted, -1)", "labels = labels.clamp(min=0)"),
    Mutant(LOSSES, "mask dropped", "labelled = None if complete else", "labelled = None if True else"),
    Mutant("fastkd/_checks.py", "mask dropped", "return not 0 <= ignore_index < n_classes", "return True"),
    Mutant(LOSSES, "weights swapped", "total = alpha * ce + (1 - alpha) * softened", "total = (1 - alpha) * ce + alpha * softened"),
    Mutant(LOSSES, "mask dropped", "distilled = keep if distill_ignored else counted", "distilled = keep"),
    Mutant("fastkd/_loss.py", "term dropped", "normalizer = weights.sum()", "normalizer = weights.numel()"),
    Mutant("fastkd/_loss.py", "mask dropped", "torch.where(keep.unsqueeze(-1), student, 0)", "student"),
    Mutant("fastkd/_engine.py", "gradient zero", "gradient(*upstream, statistics", "0 * gradient(*upstream, statistics"),
    # the floor model
    Mutant(FLOOR, "term dropped", "counts.unique_bytes - device.cache", "counts.unique_bytes"),
    Mutant(FLOOR, "bound flipped", "return max(self.resources.values())", "return min(self.resources.values())"),
    Mutant(FLOOR, "bound flipped", 'row["milliseconds"] < least', 'row["milliseconds"] > least'),
    # the meters
    Mutant(METER, "store forgotten", 'self._touch("stored", pointers, mask, values.dtype.itemsize)', "pass"),
    Mutant(METER, "load forgotten", 'self._touch("loaded", pointers, mask, np.dtype(dtype).itemsize)', "pass"),
    Mutant(METER, "mask dropped", "np.asarray(pointers)[np.broadcast_to(mask, np.shape(pointers))]", "np.asarray(pointers).ravel()"),
    Mutant(METER, "wrong size", "np.dtype(dtype).itemsize", "4"),
    Mutant(METER, "stray allowed", "np.where(inside, memory.owners[first], 0)", "np.where(inside, memory.owners[first] | 1, 1)"),
    Mutant(METER, "stray allowed", "self.owners = np.zeros(count, np.int64)", "self.owners = np.ones(count, np.int64)"),
    Mutant(METER, "race ignored", "theirs = (writer != NOBODY) & (writer != program)", "theirs = writer > 1 << 30"),
    Mutant(METER, "race ignored", "(~unread).sum()", "0"),
    Mutant(METER, "race ignored", "np.where(unread, program, SEVERAL)", "program"),
    Mutant(METER, "race ignored", "units.size - np.unique(units).size", "0"),
    Mutant(METER, "race invented", "(reader == NOBODY) | (reader == program)", "reader == NOBODY"),
    Mutant(METER, "race invented", 'if kind == "atomic":', "if False:"),
    Mutant(METER, "wrong size", "2 * a.atomic", "a.atomic"),
    Mutant(METER, "unit dropped", "int((memory.stored & own).sum()) * memory.unit", "int((memory.stored & own).sum())"),
    Mutant(METER, "not unique", "unique_loaded + a.unique_stored for", "loaded + a.stored for"),
    Mutant(METER, "never freed", "self.live_bytes -= self._sizes.pop(key)", "self._sizes.pop(key)"),
    Mutant(METER, "peak forgotten", "max(self.peak_bytes, self.live_bytes)", "self.live_bytes"),
    Mutant(METER, "view counted", "if not function.is_view and", "if"),
    Mutant(METER, "inputs counted", "self._see(tensor.untyped_storage(), 0)", "self._see(tensor.untyped_storage(), tensor.nbytes)"),
    Mutant(METER, "not unique", "min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())", "tensor.numel() * tensor.element_size()"),
    Mutant(GUARD, "stray allowed", "overwritten = int((~poisoned & ~inside).sum())", "overwritten = 0"),
    Mutant(GUARD, "store forgotten", "missing = int((poisoned & inside).sum())", "missing = 0"),
    Mutant(GUARD, "gap forgotten", ".index_fill_(0, mine.reshape(-1), True)", ".index_fill_(0, places[mine.min() : mine.max() + 1], True)"),
    # the interpreter
    Mutant(INTERPRETER, "truncated", "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16", "bits >> 16"),
    Mutant(INTERPRETER, "ties not to even", "0x7FFF + ((bits >> 16) & 1)", "0x8000"),
    Mutant(INTERPRETER, "NaN lost", "np.where(np.isnan(values), 0x7FC0, rounded)", "rounded"),
    Mutant(INTERPRETER, "too precise", "(bits & np.uint32(0xFFFFE000))", "bits"),
    Mutant(INTERPRETER, "rounded twice", "x.data.astype(np.float64) * y.data", "x.data * y.data"),
    Mutant(INTERPRETER, "NaN kept", "self.binary_op(a, b, np.fmax)", "self.binary_op(a, b, np.maximum)"),
    Mutant(INTERPRETER, "NaN kept", "np.nanmax: np.fmax.reduce", "np.nanmax: np.maximum.reduce"),
    Mutant(INTERPRETER, "bits added", "operator(widen(left.data), widen(right.data))", "operator(left.data, right.data)"),
    # the gate
    Mutant(GATE, "launch skipped", "launches.append(Launch(", "launches or launches.append(Launch("),
    Mutant(GATE, "wait allowed", "for place in WAITING", "for place in ()"),
    Mutant(GATE, "wait allowed", "WAITING = (torch.cuda, ", "WAITING = ("),
    Mutant(GATE, "wrong target", 'GPUTarget("cuda", 90, 32)', 'GPUTarget("cuda", 80, 32)'),
    Mutant(GATE, "limit dropped", '"max_shared_mem": self.device.shared_bytes', '"max_shared_mem": 1 << 30'),
    Mutant(GATE, "wrong stride", "tuple(value.shape), value.stride()", "tuple(value.shape), value.contiguous().stride()"),
    Mutant(GATE, "wrong grid", "tuple(map(int, arguments[:3]))", "tuple(map(int, arguments[2::-1]))"),
    # the count of instructions
    Mutant(SASS, "spill forgotten", 'everything["LDL"] + everything["STL"]', 'everything["LDL"]'),
    Mutant(SASS, "spill allowed", "if report.spills:", "if False:"),
    Mutant(SASS, "wrong width", "int(width[1] or width[2]) // 8", "int(width[1] or width[2]) // 16"),
    Mutant(SASS, "wrong width", "// 8 if width else 4", "// 8 if width else 16"),
    Mutant(SASS, "narrow allowed", "size < least_bytes)", "size < 1)"),
    Mutant(SASS, "float64 allowed", '("DADD", "DMUL", "DFMA", "DSETP", "DMNMX", "DMMA")', "()"),
    Mutant(SASS, "float64 refused", " and not float64:", ":"),
    Mutant(SASS, "few warps allowed", "report.warps_per_sm < least_warps", "report.warps_per_sm > least_warps"),
    Mutant(SASS, "bound ignored", "report.warps_per_sm < least_warps", "report.warps_per_sm < 16"),
    Mutant(SASS, "wrong occupancy", "max(-(-registers // 8), 1)", "max(registers // 8, 1)"),
    Mutant(SASS, "wrong occupancy", "RESERVED_SHARED_BYTES = 1024", "RESERVED_SHARED_BYTES = 0"),
    Mutant(SASS, "wrong occupancy", "MOST_PROGRAMS = 4, 64, 32", "MOST_PROGRAMS = 4, 64, 64"),
    Mutant(SASS, "outer loop counted", "r != outer and outer[0] <= r[0]", "outer[0] < r[0] < outer[0]"),
    Mutant(SASS, "loop invented", "i.target < i.address", "i.target <= i.address"),
    Mutant(SASS, "loop forgotten", 'i.name == "BRA" and', 'i.name == "JMP" and'),
    Mutant(SASS, "not counted", 'i.name.endswith("MMA")', 'i.name == "IMMA"'),
    Mutant(SASS, "not counted", 'counts["mufu"] += 1', 'counts["mufu"] += 0'),
    # the budgets
    Mutant(COUNTS, "backward skipped", "torch.autograd.grad(loss, trained)", "pass"),
    Mutant(COUNTS, "not per element", '[sweep["mufu"] / n for', '[sweep["mufu"] for'),
    Mutant(COUNTS, "wrong element", "if x.shape == trained.shape", "if x is trained"),
    Mutant(COUNTS, "wrong path", 'DEVICES["sm_90"].multiprocessors * n // shape[0]', "132"),
    Mutant(COUNTS, "backward skipped", "return forward, backward,", "return forward, forward,"),
    Mutant(BUDGETS, "sign flipped", "self.present > self.recorded * (1 + SLACK)", "self.present < self.recorded * (1 + SLACK)"),
    Mutant(BUDGETS, "sign flipped", "self.present < self.recorded * (1 - SLACK)", "self.present > self.recorded * (1 - SLACK)"),
    Mutant(BUDGETS, "too lenient", "SLACK = 0.05", "SLACK = 0.5"),
    Mutant(BUDGETS, "too strict", "SLACK = 0.05", "SLACK = 0.0"),
    Mutant(BUDGETS, "direction forgotten", 'MORE_IS_BETTER = ("warps_per_sm", "tensor")', "MORE_IS_BETTER = ()"),
    Mutant(BUDGETS, "novelty allowed", "            return True", "            return False"),
    Mutant(BUDGETS, "lost count allowed", "{**before, **now}", "now"),
    Mutant(BUDGETS, "list ignored", "for i, value in enumerate(tree)]", "for i, value in enumerate(tree[:1])]"),
    Mutant(BUDGETS, "kernel skipped", "if counts not in found[launch.name]:", "if not found[launch.name]:"),
    Mutant(BUDGETS, "not unique", "unique_bytes=[forward.floor / n", "unique_bytes=[forward.traffic / n"),
    Mutant(BUDGETS, "nothing recorded", "if options.write:", "if False:"),
    Mutant(BUDGETS, "nothing refused", "return 1 if n_worse else 0", "return 0"),
    # relations: tiles of pairs
    Mutant(PAIRS, "term dropped", "part += difference * difference", "part = difference * difference"),
    Mutant(PAIRS, "term dropped", "total += part", "total = part"),
    Mutant(PAIRS, "mask dropped", "inside = first + k < width", "inside = first + k < width + 1"),
    Mutant(PAIRS, "off by one", "inside = first + k < width", "inside = first + k < width - 1"),
    Mutant(PAIRS, "networks swapped", "if network == 0:", "if network == 1:"),
    Mutant(PAIRS, "wrong place", "pairs_ptr += network * (2 * TILE)", "pairs_ptr += network * TILE"),
    Mutant(PAIRS, "duplicate divided", "close = (distance < _LEAST_LENGTH) | (apart == 0)", "close = apart == 0"),
    Mutant(PAIRS, "scale dropped", "* _quotient(0.5, number(beta, ON_DEVICE, DTYPE), DTYPE)", "* 0.5"),
    Mutant(PAIRS, "least dropped", "length = _root(tl.where(q < _LEAST_SQUARE, _LEAST_SQUARE, q), DTYPE)", "length = distance"),
    Mutant(PAIRS, "mirror not counted", "times = tl.where(i == j, 1.0, 2.0)", "times = 1.0"),
    Mutant(PAIRS, "mirror dropped", "tl.store(mirrored_ptr, tl.trans(h))", "pass"),
    Mutant(PAIRS, "mirror dropped", "tl.store(mirrored_ptr + TILE, tl.trans(r))", "pass"),
    Mutant(PAIRS, "networks swapped", "lengths_ptr + n_lengths, n_lengths", "lengths_ptr, n_lengths"),
    Mutant(PAIRS, "off by one", "n_pairs = n.to(DTYPE) * (n - 1).to(DTYPE)", "n_pairs = n.to(DTYPE) * n.to(DTYPE)"),
    Mutant(PAIRS, "diagonal counted", "(b < n)[None, :] & (a[:, None] != b[None, :])", "(b < n)[None, :]"),
    Mutant(PAIRS, "rows of others", "(a >= first) & (a < first + n_own)", "a < first + n_own"),
    Mutant(PAIRS, "penalty quadratic", "penalty = bent * (x - 0.5 * bent)", "penalty = 0.5 * x * x"),
    Mutant(PAIRS, "mean's part dropped", "tl.sum(tl.where(apart, bent * d, 0.0))", "0.0"),
    Mutant(PAIRS, "sign flipped", "(_bent(x, DTYPE) - of_mean)", "(_bent(x, DTYPE) + of_mean)"),
    Mutant(PAIRS, "least dropped", "moved = apart & (2 * beta_ * h >= _LEAST_SQUARE)", "moved = apart & (beta_ * h < -1)"),
    Mutant(PAIRS, "point dropped", "for _ in range(start, stop):", "for _ in range(start + 1, stop):"),
    Mutant(PAIRS, "split dropped", "start, stop = split * per_split,", "start, stop = split * 0,"),
    Mutant(PAIRS, "sign flipped", "((ha + hb) - h) - (rta", "((ha - hb) - h) - (rta"),
    Mutant(PAIRS, "teacher dropped", "- (rta * rtb) * ((hta + htb) - ht)", ""),
    Mutant(PAIRS, "penalty quadratic", "loss += bent * (x - 0.5 * bent)", "loss += 0.5 * x * x"),
    Mutant(PAIRS, "ends swapped", "u, ut = ha - hb, hta - htb", "u, ut = hb - ha, hta - htb"),
    Mutant(PAIRS, "term dropped", "ra * (k + r * u)", "ra * k"),
    Mutant(PAIRS, "sign flipped", "rb * (k - r * u)", "rb * (k + r * u)"),
    Mutant(PAIRS, "term dropped", "half_r * (of_a + bent_b * rb)", "half_r * of_a"),
    Mutant(PAIRS, "sign flipped", "by_r -= at_c * bent", "by_r += at_c * bent"),
    Mutant(PAIRS, "sign flipped", "by_u += u * (of_a - bent_b * rb)", "by_u += u * (of_a + bent_b * rb)"),
    Mutant(PAIRS, "scale dropped", "by_r - beta_ * (r * (r * (r * by_u)))", "by_r - r * (r * (r * by_u))"),
    Mutant(PAIRS, "mirror not counted", "loss *= tl.where(i == j, 1.0, 2.0)", "loss *= 1.0"),
    Mutant(PAIRS, "scale dropped", "tl.sum(loss) * (beta_ * scale)", "tl.sum(loss) * scale"),
    Mutant(PAIRS, "transposition dropped", "mirrored_ptr + within, tl.trans(slope)", "mirrored_ptr + within, slope"),
    Mutant(PAIRS, "split dropped", "slope += tl.load(split_ptr)", "slope += 0 * tl.load(split_ptr)"),
    Mutant(PAIRS, "split dropped", "for _ in range(1, n_splits):", "for _ in range(2, n_splits):"),
    Mutant(PAIRS, "gradient halved", "(2 * total).to(", "total.to("),
    Mutant(PAIRS, "sign flipped", "(x - row[None, :])", "(x + row[None, :])"),
    Mutant(PAIRS, "wrong stride", "slope_ptr += padded\n", "slope_ptr += n\n"),
    Mutant(RELATIONS, "loss dropped", "n_losses=losses.numel()", "n_losses=n_tiles**2"),
    Mutant(RELATIONS, "wrong rows", "own = dict(first=problem.first, n_own=n_own)", "own = dict(first=0, n_own=n_own)"),
    Mutant(RELATIONS, "beta unbounded", "beta = max(beta, least)", "pass"),
    Mutant(RELATIONS, "weights swapped", "numbers = problem.distance_weight, problem.angle_weight, beta", "numbers = problem.angle_weight, problem.distance_weight, beta"),
    # relations in PyTorch
    Mutant(PORTABLE_RELATIONS, "mirror dropped", "squares + squares.mT", "squares + squares"),
    Mutant(PORTABLE_RELATIONS, "off by one", "n_pairs = n * (n - 1)", "n_pairs = n * n"),
    Mutant(PORTABLE_RELATIONS, "diagonal counted", "distances.diagonal(dim1=1, dim2=2).zero_()", "pass"),
    Mutant(PORTABLE_RELATIONS, "mean's part dropped", "slopes[own].sub_(of_mean)", "slopes[own]"),
    Mutant(PORTABLE_RELATIONS, "scale dropped", "mul_((beta * weight / n**2) / unit)", "mul_((weight / n**2) / unit)"),
    Mutant(PORTABLE_RELATIONS, "least dropped", "slopes.masked_fill_(squares[0, own] < LEAST_SQUARE, 0)", "slopes"),
    Mutant(PORTABLE_RELATIONS, "duplicate divided", "d.reciprocal().masked_fill_(d < LEAST_LENGTH, 0)", "d.clamp(min=1e-6).reciprocal()"),
    Mutant(PORTABLE_RELATIONS, "scale dropped", "    d.div_(beta)\n", ""),
    Mutant(PORTABLE_RELATIONS, "scale dropped", "    squares.div_(beta)\n", ""),
    Mutant(PORTABLE_RELATIONS, "sign flipped", "ends[1].neg_()", "ends[1].abs_()"),
    Mutant(PORTABLE_RELATIONS, "scale dropped", "mul_(beta / 2)", "mul_(1 / 2)"),
    Mutant(PORTABLE_RELATIONS, "term dropped", ".sub_(with_own.u[own])", ""),
    Mutant(PORTABLE_RELATIONS, "transposition dropped", "arms_with_own[:, own].T", "arms_with_own[:, own].T * 0"),
    Mutant(PORTABLE_RELATIONS, "teacher dropped", "torch.mul(teacher_q_ik, left[..., 3:], out=x)", "torch.mul(q_ik, left[..., 3:], out=x)"),
    Mutant(PORTABLE_RELATIONS, "mirror not counted", "[loss, loss] if mirrored else [loss]", "[loss]"),
    Mutant(PORTABLE_RELATIONS, "clamp dropped", "w.mul_(x.clamp_(-1, 1))", "w.mul_(x)"),
    Mutant(PORTABLE_RELATIONS, "term dropped", "v[j, i].add_(w.sum(2))", "pass"),
    Mutant(PORTABLE_RELATIONS, "mirror dropped", "v[j, k].add_(w.sum(1))", "pass"),
    Mutant(PORTABLE_RELATIONS, "mirror dropped", "s[j, k].add_(x.mul_(w).sum(1))", "pass"),
    Mutant(PORTABLE_RELATIONS, "mirror dropped", "u[k, i] = u[i, k].T", "pass"),
    Mutant(PORTABLE_RELATIONS, "term dropped", "s.addcmul_(q, v) if trained", "s if trained"),
    Mutant(PORTABLE_RELATIONS, "sign flipped", "addmm_(slopes, centred, alpha=-1)", "addmm_(slopes, centred, alpha=1)"),
    Mutant(RELATIONAL, "weight ignored", "if not isinstance(angle_weight, Tensor) and angle_weight == 0:", "if not isinstance(angle_weight, Tensor) and angle_weight != 0:"),
    Mutant(RELATIONAL, "one example", "if len(teacher) < 2:", "if len(teacher) < 1:"),
    Mutant(RELATIONAL, "share returned", "_distributed.summed(share, group)", "share"),
    Mutant(GROUP, "ranks forgotten", "scaled = loss * dist.get_world_size(group)", "scaled = loss * 1"),
    Mutant(GROUP, "wrong rows", "sum(n_rows[: dist.get_rank(group)])", "sum(n_rows[: dist.get_rank(group) + 1])"),
    Mutant(GROUP, "padding kept", "part[:n] for part", "part for part"),
    # correlations in PyTorch
    Mutant(CORRELATIONS, "sign flipped", "alpha=2 * share", "alpha=-2 * share"),
    Mutant(CORRELATIONS, "transposition dropped", "torch.add(slopes, slopes.T, out=own)", "torch.add(slopes, slopes, out=own)"),
    Mutant(CORRELATIONS, "transposition dropped", "gradient.addmm_(slopes.T, x[rows], alpha=share)", "pass"),
    Mutant(CORRELATIONS, "projection dropped", "along[:, None], value=-1)", "along[:, None], value=0)"),
    Mutant(CORRELATIONS, "scale dropped", "return _total(losses) * share", "return _total(losses)"),
    Mutant(CORRELATIONS, "no direction", "lengths.masked_fill_(lengths < LEAST_LENGTH, math.inf)", "lengths"),
    Mutant(CORRELATIONS, "mean's part dropped", "slopes.sub_(mean).div_(-totals)", "slopes.div_(-totals)"),
    Mutant(CORRELATIONS, "off by one", "_exponential(own, order - 1, out=other)", "_exponential(own, order, out=other)"),
    Mutant(CORRELATIONS, "term dropped", "torch.add(before, after, out=gradient[rows])", "torch.add(before, 0, out=gradient[rows])"),
    Mutant(CORRELATIONS, "sign flipped", "differences[1:-1].sign_()", "differences[1:-1].sign_().neg_()"),
    Mutant(CORRELATIONS, "off by one", "_total(losses) / max(n - 1, 1)", "_total(losses) / n"),
    Mutant(CORRELATIONS, "means not moved", "means.add_(shift, alpha=share)", "pass"),
    Mutant(CORRELATIONS, "chunks not joined", " + _moments(shift[:1], shift[1:], 0) * (rows.start * share)", ""),
    Mutant(CORRELATIONS, "T² dropped", "squared = temperature * temperature", "squared = temperature"),
    Mutant(CORRELATIONS, "weights swapped", "-temperature * beta / n, -temperature * gamma / n_classes", "-temperature * gamma / n, -temperature * beta / n_classes"),
    Mutant(CORRELATIONS, "term dropped", "slopes.addcmul_(p.sub_(means[1]), b_columns)", "pass"),
    Mutant(CORRELATIONS, "softmax's part dropped", "slopes.sub_(torch.mul(slopes, q, out=product).sum(1, keepdim=True))", "slopes"),
    Mutant(CORRELATIONS, "off by one", "stop = start + around.stop - around.start", "stop = start + around.stop - around.start - 1"),
    Mutant(CORRELATIONS, "off by one", "min(rows.stop + 1, n)", "min(rows.stop, n)"),
    Mutant(CORRELATIONS, "off by one", "max(rows.start - 1, 0)", "rows.start"),
    Mutant(CORRELATIONS, "off by one", "shape = min(size, n_rows - start), n_columns", "shape = min(size, n_rows - start - 1), n_columns"),
    Mutant(CORRELATIONS, "mask dropped", "sizes[:start].zero_()", "pass"),
    Mutant(CORRELATIONS, "mask dropped", "sizes[stop:].zero_()", "pass"),
    Mutant(CORRELATIONS, "mask dropped", "a.masked_fill_(deviation == 0, 0)", "a"),
    Mutant(CORRELATIONS, "term dropped", "gradient[rows].addmm_(slopes, x, alpha=share)", "pass"),
    Mutant(CORRELATIONS, "term dropped", "lengths[rows] * divisors[rows]", "lengths[rows] * lengths[rows]"),
    Mutant(CORRELATIONS, "term dropped", "slopes.div_(divisors).div_(divisors[rows, None])", "slopes.div_(divisors)"),
    Mutant(CORRELATIONS, "term dropped", "        gradient.zero_()", "        gradient.fill_(1e-3)"),
    Mutant(CORRELATIONS, "wrong divisor", "_lengths(y) + epsilon", "_lengths(y)"),
    Mutant(CORRELATIONS, "wrong divisor", "teacher.div_(_lengths(teacher)[:, None])", "teacher.div_(lengths)"),
    Mutant(CORRELATIONS, "term dropped", "difference.addcmul_(own, along, value=-1)", "difference"),
    Mutant(CORRELATIONS, "sign flipped", ".sub_(own).neg_()", ".sub_(own)"),
    Mutant(CORRELATIONS, "sign flipped", "div_(-totals)", "div_(totals)"),
    Mutant(CORRELATIONS, "term dropped", "out=product).sub_(PKT_EPSILON)  # p", "out=product)"),
    Mutant(CORRELATIONS, "term dropped", "torch.sub(difference, PKT_EPSILON, out=slopes)", "slopes.copy_(difference)"),
    Mutant(CORRELATIONS, "term dropped", "product.mul_(logs).sub_(difference).sum()", "product.mul_(logs).sum()"),
    Mutant(CORRELATIONS, "term dropped", ".sum() * (factor * factor)", ".sum() * factor"),
    Mutant(CORRELATIONS, "off by one", "range(order, 0, -1)", "range(order - 1, 0, -1)"),
    Mutant(CORRELATIONS, "wrong row", "torch.mul(own, after, out=product)", "torch.mul(own, own, out=product)"),
    Mutant(CORRELATIONS, "term dropped", "torch.sub(q, 1 / n_classes, out=a)", "a.copy_(q)"),
    Mutant(CORRELATIONS, "term dropped", "* (rows.start * share)", "* rows.start"),
    Mutant(CORRELATIONS, "term dropped", "means.add_(shift, alpha=share)", "means.add_(shift)"),
    Mutant(CORRELATIONS, "T² dropped", "-temperature * beta / n,", "-beta / n,"),
    Mutant(CORRELATIONS, "stale chunk", "if len(chunks) > 1:", "if len(chunks) > 1e9:"),
    Mutant(CORRELATIONS, "term dropped", "p.sub_(means[1])", "p"),
    Mutant(CORRELATIONS, "term dropped", "torch.sub(q, means[0], out=product), a", "q, a"),
    Mutant(CORRELATIONS, "term dropped", " + PEARSON_EPSILON", ""),
    Mutant(CORRELATIONS, "sign flipped", "a = -(both", "a = (both"),
    Mutant(CORRELATIONS, "statistics swapped", "* (teacher_deviation * b)", "* (deviation * b)"),
    Mutant(CORRELATIONS, "centre dropped", "torch.sub(rows, rows[0], out=product).mean(0).add_(rows[0])", "rows.mean(0)"),
    Mutant(CORRELATION, "empty batch", "if not student.numel():", "if False:"),
]  # fmt: skip


# each tool's own tests; those in tests/compiled run without the interpreter
_BUDGET_TESTS = [
    ["tests/compiled/test_budgets.py", "-k", "not keeps or (forward_kl and sm_90)"],
    ["tests/test_traffic.py", "-k", "budget and jensen_shannon"],
]
TESTS_OF_TOOLS = {
    FLOOR: [["tests/test_floor.py"]],
    METER: [["tests/test_meter.py"]],
    GUARD: [["tests/test_meter.py"]],
    INTERPRETER: [["tests/test_interpreter.py"]],
    GATE: [["tests/compiled/test_tools.py"]],
    SASS: [["tests/compiled/test_tools.py"]],
    COUNTS: _BUDGET_TESTS,
    BUDGETS: _BUDGET_TESTS,
}


def noticed(mutant: Mutant, applied: bool = True) -> str | None:
    """None if the tests notice; else what happened instead."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ignore = shutil.ignore_patterns("__pycache__", "demo")
        for name in ("fastkd", "tests", "benchmarks"):
            shutil.copytree(ROOT / name, root / name, ignore=ignore)
        shutil.copytree(ROOT / "kernels", root / "fastkd" / "kernels", ignore=ignore)
        shutil.copy(ROOT / "pyproject.toml", root)
        (root / "fastkd" / "demo").mkdir()
        if applied:
            mutant.apply(root)
        for selection in selections(mutant):
            command = [
                *(sys.executable, "-m", "pytest", "-x", "-q", "-W", "ignore"),
                *("-p", "no:cacheprovider", *selection),
            ]
            interpreted = "0" if "compiled" in selection[0] else "1"
            environment = {**os.environ, "PYTHONPATH": folder, "TRITON_INTERPRET": interpreted}
            # in the folder: the package beside the real tests must not be found first
            run = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True
            )
            if run.returncode == 1:
                return None
            if run.returncode:
                return f"broke the run:\n{run.stdout[-2000:]}"
    return "survived"


def selections(mutant: Mutant) -> Iterator[list[str]]:
    """What to run, the quickest to notice first."""
    if mutant.file in TESTS_OF_TOOLS:
        yield from TESTS_OF_TOOLS[mutant.file]
        return
    if mutant.file in (PAIRS, RELATIONS, PORTABLE_RELATIONS, RELATIONAL, GROUP):
        if mutant.file not in (PORTABLE_RELATIONS, GROUP):
            yield ["tests/test_relational.py", "-m", "smoke", "-k", "triton"]
        if mutant.file != GROUP:
            yield ["tests/test_relational.py", "-m", "smoke", "-k", "portable"]
        yield ["tests/test_distributed.py", "-k", "relations and 3"]
        return
    if mutant.file in (CORRELATIONS, CORRELATION):
        yield ["tests/test_correlation.py", "-m", "smoke", "-k", "portable"]
        yield ["tests/test_correlation.py", "-k", "not compile"]
        return
    engine: list[str] = []
    if mutant.file.startswith("kernels"):
        engine = ["-k", "not formula and not portable"]
        yield ["tests/test_kernels.py", "-m", "smoke"]
    elif mutant.file in (PORTABLE, SMALL):
        engine = ["-k", "not formula and not triton"]
        yield ["tests/test_value_and_gradient.py", "tests/test_kd.py", "-m", "smoke", *engine]
    ignored = [f"--ignore=tests/{name}" for name in ("compiled", "integrations")]
    yield ["tests", "-m", "smoke", *ignored, *engine]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    chosen = [m for m in MUTANTS if all(word in f"{m.file} {m}" for word in words)]
    alive, each_selection = 0, {str(list(selections(mutant))): mutant for mutant in chosen}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        unbroken = list(pool.map(lambda mutant: noticed(mutant, False), each_selection.values()))
        if any(outcome != "survived" for outcome in unbroken):
            raise SystemExit("the tests fail without any mutant: mend that first")
        for mutant, outcome in zip(chosen, pool.map(noticed, chosen), strict=True):
            alive += outcome is not None
            print(f"{'ALIVE' if outcome else 'killed':6}  {mutant.file}  {mutant}", flush=True)
            if outcome:
                print(f"        {outcome}")
    print(f"{len(chosen) - alive} of {len(chosen)} mutants killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
