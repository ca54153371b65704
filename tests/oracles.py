"""Slow, obviously right versions of what the package computes."""

import fractions
import itertools

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
