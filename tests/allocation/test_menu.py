import pytest
import torch

from pbsp.allocation.menu import MENU, PROBES, errors_from_probes, planes_bits, reference_errors
from pbsp.methods.planes import PlaneFit
from pbsp.solver.hessian import output_error
from pbsp.storage.layouts import pack
from variants import layer_problem


@pytest.mark.parametrize("planes", MENU[:12])
def test_bits_are_those_of_the_packed_tensors(planes):
    weight, moment = layer_problem(rows=5, columns=48)
    packed = pack(PlaneFit(planes, block=32, sweeps=0).compress(weight, moment))
    assert planes_bits(planes, 5, 48, 32) == 8 * sum(tensor.nbytes for tensor in packed.tensors().values())


def test_the_menu_pays_for_its_bits():
    errors = [reference_errors(128, 1)[planes] for planes in MENU]
    bits = [planes_bits(planes, 1536, 576, 128) for planes in MENU]
    assert bits == sorted(bits)
    assert errors == sorted(errors, reverse=True)


def test_probes_are_given_back_and_the_rest_is_near_what_fits_find():
    weight, moment = layer_problem(rows=64, columns=64)
    found = {
        planes: output_error(weight, PlaneFit(planes, sweeps=1).compress(weight, moment).dense(), moment)
        for planes in MENU[:11]
    }
    derived = errors_from_probes(found[PROBES[0]], found[PROBES[1]], 128, 1)
    assert derived[PROBES[0]] == pytest.approx(found[PROBES[0]], rel=1e-4)
    assert derived[PROBES[1]] == pytest.approx(found[PROBES[1]], rel=1e-4)
    for planes, error in found.items():
        assert derived[planes] == pytest.approx(error, rel=0.3), planes


def test_perfect_probes_do_not_divide_by_zero():
    assert all(torch.isfinite(torch.tensor(list(errors_from_probes(0.0, 0.0, 128, 1).values()))))
