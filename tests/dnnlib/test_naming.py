# SPDX-License-Identifier: Apache-2.0
"""The names of our packages, as a checkout has them; tests/test_wheel.py has those of an installed wheel."""
import importlib
import pickle
import sys

import pytest

import stylegan2_ada
from dnnlib import naming, util
from torch_utils import persistence
from training.formats import load


def test_a_checkout_has_the_public_interface_of_the_wheel():
    assert stylegan2_ada.load_network is load.load_network
    assert importlib.import_module('stylegan2_ada.dnnlib.util') is util
    assert util.__spec__.name == 'dnnlib.util'
    with pytest.raises(AttributeError, match='nothing'):
        _ = stylegan2_ada.nothing


def test_only_our_modules_have_an_alias():
    with pytest.raises(ModuleNotFoundError, match='stylegan2_ada'):
        importlib.import_module('stylegan2_ada.torch')


def test_installing_the_aliases_twice_changes_nothing():
    before = list(sys.meta_path)
    naming.install()
    assert sys.meta_path == before


def test_pickles_name_what_the_lineage_has():
    for thing in (util.EasyDict, persistence._reconstruct_persistent_obj):
        assert thing.__module__ in naming.IN_FILES.values()
        assert pickle.loads(pickle.dumps(thing)) is thing


@pytest.mark.parametrize('changed, source', [
    ('from stylegan2_ada import dnnlib\n', 'import dnnlib\n'),
    ('if x:\n    from stylegan2_ada.training import networks as n\n',
     'if x:\n    from training import networks as n\n'),
    ('import torch\n', 'import torch\n')])
def test_imports_are_changed_back_to_those_of_a_checkout(changed, source):
    assert naming.source_in_checkout(changed) == source
