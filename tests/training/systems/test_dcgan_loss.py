# SPDX-License-Identifier: Apache-2.0
"""Losses of DCGAN: binary cross-entropy, in the order of the paper's step."""
import pytest
import torch

from training.loss import MicroBatch
from training.phases import PhaseSource, lazy_adam
from training.systems.dcgan import DCGANDiscriminator, DCGANGenerator
from training.systems.dcgan_loss import DCGANLoss, dcgan_phases


@pytest.fixture
def parts():
    torch.manual_seed(0)
    G = DCGANGenerator(z_dim=6, img_resolution=8, img_channels=1, ngf=4)
    D = DCGANDiscriminator(img_resolution=8, img_channels=1, ndf=4)
    said = []
    empty = torch.zeros([5, 0])
    batch = MicroBatch(torch.rand(5, 1, 8, 8) * 2 - 1, empty, torch.randn(5, 6), empty)
    return DCGANLoss(G, D, report=lambda name, values: said.append((name, values.detach()))), batch, said


def entropy(logits, target):
    p = torch.sigmoid(logits)
    return -(target * p.log() + (1 - target) * (1 - p).log())


def test_the_discriminator_learns_from_real_images_then_from_fakes(parts):
    loss, batch, said = parts
    real, fake = list(loss.discriminator_main(batch))
    torch.testing.assert_close(real, entropy(loss.D(batch.real_img), 1))
    torch.testing.assert_close(fake, entropy(loss.D(loss.G(batch.gen_z)), 0))
    assert [name for name, _ in said] == [
        'Loss/scores/real', 'Loss/signs/real', 'Loss/scores/fake', 'Loss/signs/fake', 'Loss/D/loss']
    torch.testing.assert_close(said[-1][1], (real + fake).detach())


def test_the_step_of_the_discriminator_gives_the_generator_no_gradient(parts):
    loss, batch, _ = parts
    for value in loss.discriminator_main(batch):
        value.mean().backward()
    assert all(p.grad is None for p in loss.G.parameters())
    assert all(p.grad is not None for p in loss.D.parameters())


def test_the_generator_wants_its_images_taken_for_real(parts):
    loss, batch, said = parts
    (value,) = loss.generator_main(batch)
    torch.testing.assert_close(value, entropy(loss.D(loss.G(batch.gen_z)), 1))
    assert said[-1][0] == 'Loss/G/loss'


def test_everything_that_the_discriminator_sees_is_augmented(parts):
    loss, batch, _ = parts
    seen = []
    loss.augment_pipe = lambda img: seen.append(len(img)) or torch.zeros_like(img)
    list(loss.discriminator_main(batch))
    list(loss.generator_main(batch))
    assert seen == [5, 5, 5]


def test_an_iteration_is_a_step_of_the_discriminator_and_one_of_the_generator(parts):
    loss, batch, _ = parts
    sources = [PhaseSource(net, lazy_adam(list(net.parameters()), 2e-4, (0.5, 0.999), 1e-8, None), None)
               for net in (loss.G, loss.D)]
    phases = dcgan_phases(loss, *sources)
    assert [(phase.name, phase.interval) for phase in phases] == [('Dmain', 1), ('Gmain', 1)]
    for phase, moved, still in ((phases[0], loss.D, loss.G), (phases[1], loss.G, loss.D)):
        before = [[p.detach().clone() for p in net.parameters()] for net in (moved, still)]
        phase.run([batch])
        assert not any(torch.equal(a, b) for a, b in zip(before[0], moved.parameters(), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(before[1], still.parameters(), strict=True))
    # Adam without the correction for lazy regularisation: a first step of just the learning rate.
    group = sources[0].opt.param_groups[0]
    assert (group['lr'], group['betas'], loss.pl_mean.item()) == (2e-4, (0.5, 0.999), 0)
