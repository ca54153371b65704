import pytest
import torch

from pbsp.allocation.entry import entry_bits, format_entry, parse_entry
from pbsp.allocation.menu import MENU, PROBES, entry_fit, errors_from_probes, reference_errors
from pbsp.errors import PatternError
from pbsp.methods.planes import PlaneFit
from pbsp.solver.hessian import output_error
from pbsp.storage.layouts import pack
from variants import layer_problem


@pytest.mark.parametrize("block", [32, 64])
@pytest.mark.parametrize("entry", [*MENU[:12], *MENU[-4:]])
def test_bits_are_those_of_the_packed_tensors(entry, block):
    weight, moment = layer_problem(rows=5, columns=160)
    packed = pack(entry_fit(entry, PlaneFit(block=block, sweeps=0)).compress(weight, moment))
    assert entry_bits(entry, 5, 160, block) == 8 * sum(tensor.nbytes for tensor in packed.tensors().values())


@pytest.mark.parametrize("entry", MENU)
def test_entries_are_written_and_read(entry):
    assert parse_entry(format_entry(entry)) == entry


@pytest.mark.parametrize("text", ["16 bit", "4bit", "5 bit", "4 bit+2:8", "4"])
def test_what_is_no_entry_is_refused(text):
    with pytest.raises(PatternError, match="is not a pattern"):
        parse_entry(text)


def test_the_menu_pays_for_its_bits():
    for text in ("bit", "e8", ":"):
        kind = [entry for entry in MENU if text in format_entry(entry)]
        assert len(kind) > 3
        errors = [reference_errors(128, 1)[entry] for entry in kind]
        bits = [entry_bits(entry, 1536, 576, 128) for entry in kind]
        assert bits == sorted(bits)
        assert errors == sorted(errors, reverse=True)


def test_probes_are_given_back_and_the_rest_is_near_what_fits_find():
    weight, moment = layer_problem(rows=64, columns=64)
    fits = {entry: entry_fit(entry, PlaneFit(sweeps=1)) for entry in MENU[:11]}
    found = {
        entry: output_error(weight, fit.compress(weight, moment).dense(), moment)
        for entry, fit in fits.items()
    }
    derived = errors_from_probes(found[PROBES[0]], found[PROBES[1]], 128, 1)
    assert derived[PROBES[0]] == pytest.approx(found[PROBES[0]], rel=1e-4)
    assert derived[PROBES[1]] == pytest.approx(found[PROBES[1]], rel=1e-4)
    for entry, error in found.items():
        assert derived[entry] == pytest.approx(error, rel=0.3), entry


def test_errors_of_integers_are_derived_as_near_where_inputs_are_white():
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    found = {
        entry: output_error(
            weight,
            entry_fit(entry, PlaneFit(sweeps=1)).compress(weight, torch.eye(64)).dense(),
            torch.eye(64),
        )
        for entry in (*PROBES, 2, 3, 4, 8)
    }
    derived = errors_from_probes(found[PROBES[0]], found[PROBES[1]], 128, 1)
    for bits in (2, 3, 4, 8):
        assert derived[bits] == pytest.approx(found[bits], rel=0.5), bits


def test_perfect_probes_do_not_divide_by_zero():
    assert all(torch.isfinite(torch.tensor(list(errors_from_probes(0.0, 0.0, 128, 1).values()))))
