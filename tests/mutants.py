"""Break the engines one line at a time: the quick tests must notice every time.

    python tests/mutants.py [words]        mutants whose description or file holds every word

A mutant lives in a copy of the package; one that survives is a hole in the tests.
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
    Mutant(TERMS, "weights swapped", "1 - weight if DIVERGENCE", "weight if DIVERGENCE"),
    Mutant(TERMS, "term dropped", "+ (1 - of_teacher) * q", "+ q"),
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
    Mutant(PORTABLE, "weights swapped", 'return 1 - weight if name == "skew_reverse_kl"', 'return weight if name == "skew_reverse_kl"'),
    Mutant(PORTABLE, "term dropped", "q.d.add_(ratio)", "q.d.add_(0)"),
    Mutant(PORTABLE, "mask dropped", ".clamp_(min=torch.finfo(q.e.dtype).tiny)", ""),
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
    Mutant(PORTABLE, "sign flipped", "torch.sub(logits, offset, out=d)", "torch.add(logits, offset, out=d)"),
    Mutant(PORTABLE, "wrong temperature", "_softmax(z_teacher, teacher_temperature,", "_softmax(z_teacher, temperature,"),
    Mutant(PORTABLE, "wrong temperature", "_softmax(z_teacher, teacher_temperature,", "_softmax(z_teacher, temperature,", 2),
    # its short way for few logits
    Mutant(SMALL, "sign flipped", "above = d_q.sub_(d_p)", "above = d_p.sub_(d_q)"),
    Mutant(SMALL, "sign flipped", "ratio = log_total_p.sub_(log_total_q)", "ratio = log_total_q.sub_(log_total_p)"),
    Mutant(SMALL, "term dropped", "above.mul_(p).sum(-1).add_(ratio).neg_()", "above.mul_(p).sum(-1).neg_()"),
    Mutant(SMALL, "term dropped", "both.total[0].log2().squeeze(-1) - d_q.mul_(p).sum(-1)", "-d_q.mul_(p).sum(-1)"),
    Mutant(SMALL, "term dropped", "reverse = of_q.squeeze(-1) + ratio", "reverse = of_q.squeeze(-1)"),
    Mutant(SMALL, "term dropped", "above.sub_(of_q).mul_(q.mul_(_LN2))", "above.mul_(q.mul_(_LN2))"),
    Mutant(SMALL, "term dropped", ".add_(q.sub_(p), alpha=weight)", ""),
    Mutant(SMALL, "weights swapped", "reverse.mul_(1 - weight).sub_(forward, alpha=weight)", "reverse.mul_(weight).sub_(forward, alpha=1 - weight)"),
    Mutant(SMALL, "gradient zero", "add_(ratio).neg_(), q.sub_(p)", "add_(ratio).neg_(), q.zero_()"),
    Mutant(SMALL, "statistics swapped", "ratio = total / total_q", "ratio = total_q / total"),
    Mutant(SMALL, "rescaling dropped", "    q.mul_(ratio)", "    pass"),
    Mutant(SMALL, "weights swapped", "share = 1 - weight if", "share = weight if"),
    Mutant(SMALL, "sign flipped", "q, total, weight - 1)", "q, total, 1 - weight)"),
    Mutant(SMALL, "term dropped", "above.sub_(torch.div(q, m, out=m), alpha=weight / _LN2)", "pass"),
    Mutant(SMALL, "weights swapped", "torch.lerp(of_q, of_p, weight)", "torch.lerp(of_p, of_q, weight)"),
    Mutant(SMALL, "term dropped", "mean = (v * q).sum(-1, keepdim=True)", "mean = v.new_zeros((*v.shape[:-1], 1))"),
    Mutant(SMALL, "term dropped", "        mean.div_(total)", "        pass"),
    Mutant(SMALL, "sign flipped", "_centred(difference.sign_(), q.e)", "_centred(difference.sign_().neg_(), q.e)"),
    Mutant(SMALL, "term dropped", ".mul_(0.5 / _LN2)", ".mul_(1 / _LN2)"),
    Mutant(SMALL, "T² dropped", "losses.mul_(_LN2 * scale)", "losses.mul_(_LN2)"),
    Mutant(SMALL, "T² dropped", "unit = problem.scale / problem.student_temperature", "unit = 1 / problem.student_temperature"),
    Mutant(SMALL, "term dropped", "unit = problem.scale / problem.student_temperature", "unit = problem.scale"),
    Mutant(SMALL, "wrong temperature", "unit = 1 / (_LN2 * temperature)", "unit = 1 / _LN2"),
    Mutant(SMALL, "mask dropped", "losses.masked_fill_(~keep, 0)", "pass"),
    Mutant(SMALL, "mask dropped", "slope.masked_fill_(~keep.unsqueeze(-1), 0)", "pass"),
    Mutant(SMALL, "mask dropped", "not math.isfinite(visible.sum().item())", "False"),
    Mutant(SMALL, "mask dropped", "losses.masked_fill_(left_out, 0)", "losses"),
    Mutant(SMALL, "mask dropped", "slope.masked_fill_(left_out, 0)", "slope"),
    Mutant(SMALL, "label dropped", ".sub_(student.d.gather(-1, classes))", ""),
    Mutant(SMALL, "sign flipped", "slope.ndim, -1.0)", "slope.ndim, 1.0)"),
    Mutant(SMALL, "label dropped", "gradient.add_(of_labels)", "gradient"),
    # what calls the engines
    Mutant(LOSSES, "T² dropped", "scale = temperature**2 if scale_t2 else 1.0", "scale = 1.0"),
    Mutant(LOSSES, "mask dropped", "labels = labels.masked_fill(~counted, -1)", "labels = labels.clamp(min=0)"),
    Mutant(LOSSES, "mask dropped", "labelled = None if complete else", "labelled = None if True else"),
    Mutant("fastkd/_checks.py", "mask dropped", "return not 0 <= ignore_index < n_classes", "return True"),
    Mutant(LOSSES, "weights swapped", "total = alpha * ce + (1 - alpha) * softened", "total = (1 - alpha) * ce + alpha * softened"),
    Mutant(LOSSES, "mask dropped", "distilled = keep if distill_ignored else counted", "distilled = keep"),
    Mutant("fastkd/_loss.py", "term dropped", "normalizer = weights.sum()", "normalizer = weights.numel()"),
    Mutant("fastkd/_loss.py", "mask dropped", "torch.where(keep.unsqueeze(-1), student, 0)", "student"),
    Mutant("fastkd/_engine.py", "gradient zero", "gradient(*upstream, statistics", "0 * gradient(*upstream, statistics"),
]  # fmt: skip


def noticed(mutant: Mutant | None) -> str | None:
    """None if the tests notice; else what happened instead. Without a mutant they must pass."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        ignore = shutil.ignore_patterns("__pycache__", "demo")
        shutil.copytree(ROOT / "fastkd", root / "fastkd", ignore=ignore)
        shutil.copytree(ROOT / "kernels", root / "fastkd" / "kernels", ignore=ignore)
        (root / "fastkd" / "demo").mkdir()
        if mutant:
            mutant.apply(root)
        for selection in selections(mutant):
            command = [
                *(sys.executable, "-m", "pytest", "-x", "-q", "-m", "smoke", "-W", "ignore"),
                *("-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")),
                *(f"--rootdir={ROOT}", *selection),
            ]
            environment = {**os.environ, "PYTHONPATH": folder, "TRITON_INTERPRET": "1"}
            # from the folder: the package beside the tests must not be found first
            run = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True
            )
            if run.returncode == 1:
                return None
            if run.returncode:
                return f"broke the run:\n{run.stdout[-2000:]}"
    return "survived"


def selections(mutant: Mutant | None) -> Iterator[list[str]]:
    """What to run, the quickest to notice first."""
    tests = ROOT / "tests"
    engine: list[str] = []
    if mutant and mutant.file.startswith("kernels"):
        engine = ["-k", "not formula and not portable"]
        yield [str(tests / "test_kernels.py")]
    elif mutant and mutant.file in (PORTABLE, SMALL):
        engine = ["-k", "not formula and not triton"]
        yield [str(tests / "test_value_and_gradient.py"), str(tests / "test_kd.py"), *engine]
    ignored = [f"--ignore={tests / name}" for name in ("compiled", "integrations")]
    yield [str(tests), *ignored, *engine]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    chosen = [m for m in MUTANTS if all(word in f"{m.file} {m}" for word in words)]
    if noticed(None) != "survived":
        raise SystemExit("the tests fail without any mutant: mend that first")
    alive = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for mutant, outcome in zip(chosen, pool.map(noticed, chosen), strict=True):
            alive += outcome is not None
            print(f"{'ALIVE' if outcome else 'killed':6}  {mutant.file}  {mutant}", flush=True)
            if outcome:
                print(f"        {outcome}")
    print(f"{len(chosen) - alive} of {len(chosen)} mutants killed")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
