"""Slow, obviously right versions of what the package computes."""

import fractions
import itertools
import struct

import torch


def sweep_by_reinversion(weight, hessian, block):
    """Optimal brain surgeon, one block at a time, with no factorisation to get wrong."""
    current = weight.clone()
    result = torch.zeros_like(weight)
    for low in range(0, weight.shape[1], block):
        high = min(low + block, weight.shape[1])
        inverse = torch.linalg.inv(hessian[low:, low:])
        width = high - low
        result[:, low:high] = current[:, low:high].round()
        error = current[:, low:high] - result[:, low:high]
        current[:, low:] -= error @ torch.linalg.inv(inverse[:width, :width]) @ inverse[:width]
    return result


def points_of_e8(largest=4):
    """All points of E8, doubled, with such entries: all even or all odd, their sum a multiple of 4."""
    for entries in (range(-largest, largest + 1, 2), range(1 - largest, largest, 2)):
        for point in itertools.product(entries, repeat=8):
            if sum(point) % 4 == 0:
                yield point


def best_code_by_enumeration(correlation, metric, scale, pattern):
    """The code of one group with the least scale · c G cᵀ − 2 c · t, trying all of them."""
    best, best_loss = None, float("inf")
    for support in itertools.combinations(range(pattern.group), pattern.kept):
        for signs in itertools.product((1.0, -1.0), repeat=pattern.kept):
            code = torch.zeros(pattern.group)
            code[list(support)] = torch.tensor(signs)
            loss = float(scale * (code @ metric @ code) - 2 * code @ correlation)
            if loss < best_loss:
                best, best_loss = code, loss
    return best


def scales_by_least_squares(weight, signs, inputs, scale_block):
    """Each row's scales by an ordinary regression of its outputs on those of every plane and block."""
    planes, rows, columns = signs.shape
    blocks = -(-columns // scale_block)
    scales = torch.zeros(planes, rows, blocks, dtype=weight.dtype)
    for row in range(rows):
        regressors = []
        for plane in range(planes):
            for block in range(blocks):
                part = torch.zeros(columns, dtype=weight.dtype)
                span = slice(block * scale_block, (block + 1) * scale_block)
                part[span] = signs[plane, row, span]
                regressors.append(inputs @ part)
        fit = torch.linalg.lstsq(torch.stack(regressors, 1), (inputs @ weight[row])[:, None]).solution
        scales[:, row] = fit[:, 0].view(planes, blocks)
    return scales


def code_bytes_by_integers(signs, pattern):
    """The stored bytes of each row of one plane, from Python's big integers and a sorted list of supports."""
    supports = itertools.combinations(range(pattern.group), pattern.kept)
    colexicographic = sorted(supports, key=lambda support: support[::-1])
    rank = {support: number for number, support in enumerate(colexicographic)}
    rows = []
    for row in signs.tolist():
        stream, bits = 0, 0
        for low in range(0, len(row), pattern.group):
            group = row[low : low + pattern.group]
            support = tuple(position for position, sign in enumerate(group) if sign)
            code = rank[support] * 2**pattern.kept
            code += sum(2**i for i, position in enumerate(support) if group[position] > 0)
            stream |= code << bits
            bits += pattern.code_bits
        rows.append(stream.to_bytes((bits + 7) // 8, "little"))
    return rows


def scale_by_integers(code, offset):
    """The exact value of a stored scale, as a fraction."""
    field, fraction = divmod(code, 32)
    mantissa = fraction if field == 0 else (32 + fraction) * 2 ** (field - 1)
    return mantissa * fractions.Fraction(2) ** offset


def losses_and_divergence(model, original, window):
    """Loss, KL(original ‖ model) and agreement of one window, position by position in float64."""
    losses, divergences, agreements = [], [], []
    for position in range(len(window) - 1):
        prefix = window[: position + 1].unsqueeze(0)
        with torch.no_grad():
            q = model(input_ids=prefix).logits[0, -1].double().softmax(0)
            p = original(input_ids=prefix).logits[0, -1].double().softmax(0)
        losses.append(-float(q[window[position + 1]].log()))
        divergences.append(float((p * (p / q).log()).sum()))
        agreements.append(float(p.argmax() == q.argmax()))
    count = len(window) - 1
    return sum(losses) / count, sum(divergences) / count, sum(agreements) / count


def grouped_bytes_by_integers(matrix):
    """The stored bytes of layout `paper`, weight by weight: codes, members, scalars and salient columns."""

    def stream(numbers, width):
        bits = sum(number << width * place for place, number in enumerate(numbers))
        return bits.to_bytes((width * len(numbers) + 7) // 8, "little")

    salient = matrix.salient.tolist()
    part_rows = len(matrix.signs) // len(salient)
    members, scalars = [], []
    for row, signs in enumerate(matrix.signs.tolist()):
        numbers = []
        for column, sign in enumerate(signs):
            if sign and salient[row // part_rows][column]:
                numbers.append(int(matrix.residual_signs[row, column] == 1))
            elif sign:
                numbers.append(int(matrix.groups[row, column]))
        members.append(stream(numbers, 2))
        flat = matrix.scalars[row].flatten().tolist()
        scalars.append(struct.pack(f"<{len(flat)}e", *flat))
    codes = code_bytes_by_integers(matrix.signs, matrix.pattern)
    return codes, members, scalars, [stream([int(bit) for bit in columns], 1) for columns in salient]


def grouped_weight(matrix, row, column):
    """One weight of layout `paper`, from the words of its definition."""
    sign = int(matrix.signs[row, column])
    scalars = matrix.scalars[row, column // matrix.block].tolist()
    part_rows = len(matrix.signs) // len(matrix.salient)
    if sign == 0:
        return 0.0
    if matrix.salient[row // part_rows, column]:
        first, second, mean = scalars[6:]
        return first * sign + second * int(matrix.residual_signs[row, column]) + mean
    group = int(matrix.groups[row, column])
    return scalars[2 * group] * sign + scalars[2 * group + 1]


def coefficients_by_least_squares(weight, terms, inputs):
    """Each row's coefficients by an ordinary regression of its outputs on those of every term."""
    rows = []
    for row in range(len(weight)):
        regressors = inputs @ terms[row].T
        fit = torch.linalg.lstsq(regressors, (inputs @ weight[row])[:, None], driver="gelsd").solution
        rows.append(regressors @ fit[:, 0])
    return torch.stack(rows)  # the fitted outputs: coefficients of equal terms are not unique


def best_mask_by_enumeration(weight, metric, kept):
    """The support of one row and its least loss when the kept weights themselves are refitted freely."""
    best, best_loss = None, float("inf")
    for support in itertools.combinations(range(len(weight)), kept):
        index = list(support)
        inner = metric[index][:, index]
        solution = torch.linalg.solve(inner, metric[index] @ weight)
        residual = weight.clone()
        residual[index] -= solution
        loss = float(residual @ metric @ residual)
        if loss < best_loss:
            best, best_loss = index, loss
    return best, best_loss


def salient_count_by_trying(weight, keep, order, most):
    """How many of the ordered columns to binarize twice, by the squared error left, α's without means."""

    def error(values):
        if not len(values):
            return 0.0
        alpha = values.abs().mean()
        return float((values - alpha * torch.where(values < 0, -1.0, 1.0)).square().sum())

    losses = []
    for count in range(most + 1):
        chosen = set(order[:count].tolist())
        loss = 0.0
        for row in range(len(weight)):
            inside = [j for j in range(weight.shape[1]) if keep[row, j] and j in chosen]
            outside = [j for j in range(weight.shape[1]) if keep[row, j] and j not in chosen]
            values = weight[row, inside]
            if len(values):
                values = values - values.abs().mean() * torch.where(values < 0, -1.0, 1.0)
            loss += error(values) + error(weight[row, outside])
        losses.append(loss)
    return losses


def ranges_by_trying(values, width, *, search):
    """Scale and zero point of one row of a group, in Python's floats: the first of the best ranges."""

    def half(number):
        return struct.unpack("<e", struct.pack("<e", number))[0]

    top, best, least = 2**width - 1, None, float("inf")
    low, high = min(0.0, *values), max(0.0, *values)
    for step in range(80 if search else 1):
        shrink = 1 - step / 100
        scale = half(max((shrink * high - shrink * low) / top, 2.0**-24))
        zero = min(max(round(-shrink * low / scale), 0), top)
        rounded = [integer_by_rounding(value, scale, zero, width) for value in values]
        error = sum(abs(value - other) ** 2.4 for value, other in zip(values, rounded, strict=True))
        if error < least:
            best, least = (scale, zero), error
    return *best, least


def integer_by_rounding(value, scale, zero, width):
    """The nearest of the 2^width values scale · (code − zero)."""
    return scale * (min(max(round(value / scale) + zero, 0), 2**width - 1) - zero)


def gptq_by_reinversion(weight, hessian, width, block, *, search):
    """GPTQ from its definition: what is left of the hessian is inverted again for every column."""
    current = weight.clone()
    for j in range(weight.shape[1]):
        if j % block == 0:
            ranges = [
                ranges_by_trying(row, width, search=search) for row in current[:, j : j + block].tolist()
            ]
        inverse = torch.linalg.inv(hessian[j:, j:])
        column = current[:, j].tolist()
        rounded = [integer_by_rounding(w, *ranges[row][:2], width) for row, w in enumerate(column)]
        error = current[:, j] - torch.tensor(rounded, dtype=weight.dtype)
        current[:, j:] -= torch.outer(error / inverse[0, 0], inverse[0])
    return current


def rows_by_reinversion(weight, hessian, bits):
    """Integers of layout `rows` from their definition: what is left of the hessian is inverted every time."""

    def half(number):
        return struct.unpack("<e", struct.pack("<e", number))[0]

    def value(weight, scale):
        if bits == 8:
            return scale * min(max(round(weight / scale), -127), 127)
        return scale * (min(max(round(weight / scale + 7.5), 0), 15) - 7.5)

    def scale_of(row):
        largest = max(map(abs, row))
        if bits == 8:
            scale = half(largest / 127)
            # the next float16, if that is below
            return scale if scale >= largest / 127 else half(scale * (1 + 2**-10))
        tried = [half(largest / 7.5 * shrink) for shrink in (1 - step / 20 for step in range(11))]
        return min(tried, key=lambda scale: sum((value(w, scale) - w) ** 2 for w in row))

    current = weight.clone()
    for j in range(weight.shape[1]):
        if (bits == 4 and j % 32 == 0) or j == 0:
            end = j + 32 if bits == 4 else None
            scales = [scale_of(row) for row in current[:, j:end].tolist()]
        inverse = torch.linalg.inv(hessian[j:, j:])
        rounded = [value(w, scale) for w, scale in zip(current[:, j].tolist(), scales, strict=True)]
        error = current[:, j] - torch.tensor(rounded, dtype=weight.dtype)
        current[:, j:] -= torch.outer(error / inverse[0, 0], inverse[0])
    return current


def binarized_by_hand(values, *, terms=1, means=True):
    """The base binarizer of a few numbers: what each is approximated by, zero counting as positive."""
    total = [0.0] * len(values)
    for _ in range(terms):
        rest = [value - so_far for value, so_far in zip(values, total, strict=True)]
        mean = sum(rest) / len(rest) if means and rest else 0.0
        centred = [value - mean for value in rest]
        alpha = sum(abs(value) for value in centred) / len(centred) if centred else 0.0
        for place, value in enumerate(centred):
            total[place] += mean + (-alpha if value < 0 else alpha)
    return total


def binarized_by_level(weight, keep, salient, groups, *, means=True):
    """Each row's kept weights of a group and kind of column binarized together, salient ones twice."""
    result = torch.zeros_like(weight)
    for row in range(len(weight)):
        levels = {}
        for column in range(weight.shape[1]):
            if keep[row, column]:
                levels.setdefault((bool(salient[column]), int(groups[row, column])), []).append(column)
        for (twice, _), columns in levels.items():
            values = weight[row, columns].tolist()
            fitted = binarized_by_hand(values, terms=1 + twice, means=means)
            result[row, columns] = torch.tensor(fitted, dtype=weight.dtype)
    return result


def arb_by_loop(values, rounds):
    """μ, α and the signs of one row after each round of ARB, from its base binarizer on."""
    count = len(values)
    mean = sum(values) / count
    signs = [-1.0 if value < mean else 1.0 for value in values]
    alpha = sum(abs(value - mean) for value in values) / count
    states = [(mean, alpha, signs)]
    for _ in range(rounds):
        mean += sum(value - alpha * sign - mean for value, sign in zip(values, signs, strict=True)) / count
        alpha = sum(sign * (value - mean) for value, sign in zip(values, signs, strict=True)) / count
        signs = [-1.0 if value < mean else 1.0 for value in values]
        states.append((mean, alpha, signs))
    return states


def rank_one_terms_by_loop(weight, member, terms, rounds):
    """ARB-RC on the members: row scales, column scales, term after term, then all signs, by weight."""
    rows, columns = weight.shape
    inside = [[j for j in range(columns) if member[i, j]] for i in range(rows)]
    r, c, b = [], [], []

    def approximation(i, j, left_out=None):
        return sum(r[t][i] * c[t][j] * b[t][i][j] for t in range(len(r)) if t != left_out)

    w = weight.tolist()
    for _ in range(terms):
        rest = [[w[i][j] - approximation(i, j) for j in range(columns)] for i in range(rows)]
        b.append([[-1.0 if value < 0 else 1.0 for value in row] for row in rest])
        r.append([sum(abs(rest[i][j]) for j in inside[i]) / max(len(inside[i]), 1) for i in range(rows)])
        c.append([1.0] * columns)
    for _ in range(rounds):
        for t in range(terms):
            v = [
                [b[t][i][j] * (w[i][j] - approximation(i, j, t)) for j in range(columns)] for i in range(rows)
            ]
            for i in range(rows):
                below = sum(c[t][j] ** 2 for j in inside[i])
                r[t][i] = sum(v[i][j] * c[t][j] for j in inside[i]) / below if below else 0.0
            for j in range(columns):
                there = [i for i in range(rows) if member[i, j]]
                below = sum(r[t][i] ** 2 for i in there)
                c[t][j] = sum(v[i][j] * r[t][i] for i in there) / below if below else 0.0
        for i in range(rows) if terms > 1 else ():
            for j in inside[i]:
                choices = itertools.product((1.0, -1.0), repeat=terms)
                sizes = [r[t][i] * c[t][j] for t in range(terms)]
                best = min(
                    choices, key=lambda s: abs(w[i][j] - sum(a * x for a, x in zip(s, sizes, strict=True)))
                )
                for t in range(terms):
                    b[t][i][j] = best[t]
    dense = torch.zeros_like(weight)
    for i in range(rows):
        for j in inside[i]:
            dense[i, j] = approximation(i, j)
    return dense


def sparsegpt_by_reinversion(weight, hessian, pattern):
    """SparseGPT from its definition: what is left of the hessian is inverted again for every column."""
    current, keep = weight.clone(), torch.ones_like(weight, dtype=torch.bool)
    columns = weight.shape[1]
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(columns)]
    for j in range(columns):
        if j % pattern.group == 0:
            for row in range(len(weight)):
                cost = [float(current[row, q] ** 2 / inverses[q][0, 0]) for q in range(j, j + pattern.group)]
                for q in sorted(range(pattern.group), key=cost.__getitem__)[: pattern.group - pattern.kept]:
                    keep[row, j + q] = False
        error = current[:, j] * ~keep[:, j] / inverses[j][0, 0]
        current[:, j:] -= torch.outer(error, inverses[j][0])
        current[:, j] *= keep[:, j]
    return current, keep


def sweep_by_columns(weight, factor, block, *, mode):
    """The compensated sweep of rounding, one column's error after the other, as the papers' code has it."""
    current = weight.clone()
    for low in range(0, weight.shape[1], block):
        high = min(low + block, weight.shape[1])
        for j in range(low, high):
            rounded = current[:, j].round()
            if mode == "diagonal":
                error = (current[:, j] - rounded) / factor[j, j]
                for later in range(high, weight.shape[1]):
                    current[:, later] -= error * factor[j, later]
            current[:, j] = rounded
    return current


def ridge_regression_by_rows(target, regressors, anchor, penalty, ridge):
    """Each row by an ordinary regression: a penalty is as many further observations as there are unknowns."""
    unit = torch.eye(regressors.shape[1], dtype=target.dtype)
    design = torch.cat([regressors, penalty**0.5 * unit, ridge**0.5 * unit])
    rows = []
    for seen, near in zip(target, anchor, strict=True):
        observed = torch.cat([seen, penalty**0.5 * near, torch.zeros_like(near)])
        rows.append(torch.linalg.lstsq(design, observed[:, None]).solution[:, 0])
    return torch.stack(rows)


def signed_rank_one_by_svd(matrix):
    """The best rank-one approximation of the magnitudes, with the matrix's signs; 0 counts as positive."""
    left, sizes, right = torch.linalg.svd(matrix.abs())
    magnitudes = sizes[0] * torch.outer(left[:, 0], right[0])
    return torch.where(matrix < 0, -magnitudes, magnitudes)


def binary_factors_by_inversion(target, latents, iterations, ridge):
    """Consensus of both factors after alternating directions, written out from the paper's equations."""
    target_of = (target, target.T)
    consensus = [signed_rank_one_by_svd(latent) for latent in latents]
    dual = [latent - signed for latent, signed in zip(latents, consensus, strict=True)]
    for iteration in range(iterations):
        penalty = iteration / iterations
        for own, other in ((0, 1), (1, 0)):
            unit = consensus[other] / consensus[other].norm(dim=0)
            system = unit.T @ unit + (penalty + ridge) * torch.eye(unit.shape[1], dtype=unit.dtype)
            right = target_of[own] @ unit + penalty * (consensus[own] - dual[own])
            latent = right @ torch.linalg.inv(system)
            consensus[own] = signed_rank_one_by_svd(latent + dual[own])
            dual[own] = dual[own] + latent - consensus[own]
    return consensus


def row_scales_by_regression(weight, sums, column_scales, inputs):
    """Each row's scale by regressing its outputs on those of its signs."""
    scales = []
    for row, code in zip(weight, sums * column_scales, strict=True):
        scales.append(torch.linalg.lstsq((inputs @ code)[:, None], (inputs @ row)[:, None]).solution[0, 0])
    return torch.stack(scales)


def column_scales_by_regression(weight, sums, row_scales, inputs):
    """The scales of all columns by regressing the outputs of all rows at once."""
    design = torch.cat([inputs * code for code in row_scales[:, None] * sums])
    outputs = torch.cat([inputs @ row for row in weight])
    return torch.linalg.lstsq(design, outputs[:, None]).solution[:, 0]
