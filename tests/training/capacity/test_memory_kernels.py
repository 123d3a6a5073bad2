# SPDX-License-Identifier: Apache-2.0
"""Which kernels are compiled before the first step, on a machine that only seems to have a GPU."""
import pytest
import torch
from small_run import SmallRun, small_config

from torch_utils import custom_ops
from training.capacity import memory


@pytest.fixture
def obtained(monkeypatch):
    seen = []
    monkeypatch.setattr(custom_ops, 'is_available', lambda device: True)
    monkeypatch.setattr(custom_ops, 'architecture_of', lambda device: 'sm_90')
    monkeypatch.setattr(
        custom_ops, 'obtain_all', lambda kernels, arch: seen.append((list(kernels), arch)))
    return seen


def compile_for(run, device='cuda'):
    memory.compile_kernels(run.state, run.phases, run.config, torch.device(device))


def test_a_cpu_compiles_nothing(obtained):
    compile_for(SmallRun(small_config()), 'cpu')
    assert not obtained


def test_the_rehearsal_leaves_the_weights_alone_and_what_it_notes_is_obtained(obtained):
    run = SmallRun(small_config())
    before = {name: value.clone() for name, value in run.state.G.state_dict().items()}
    compile_for(run)
    assert all(torch.equal(value, before[name]) for name, value in run.state.G.state_dict().items())
    assert obtained == [([], 'sm_90')]  # a CPU asks for no kernels


@pytest.mark.parametrize('text, is_raised', [('CUDA out of memory', False), ('shape mismatch', True)])
def test_only_a_lack_of_memory_is_let_pass(obtained, monkeypatch, text, is_raised):
    def fail(*args):
        raise RuntimeError(text)
    monkeypatch.setattr(memory, 'rehearse', fail)
    if is_raised:
        with pytest.raises(RuntimeError, match=text):
            compile_for(SmallRun(small_config()))
    else:
        compile_for(SmallRun(small_config()))
        assert len(obtained) == 1


def test_few_images_still_fill_a_group_of_the_standard_deviation():
    config = small_config(batch=16)
    assert memory.with_few_images(config).batch_gpu == config.D.mbstd_group_size < 16
