# SPDX-License-Identifier: Apache-2.0
"""The flags of train.py: a row each. The order of the rows is that of the checks, the help and the run's
name.

A row makes the click option, its check, the change to the settings and the part of the run's name. Settings
are a flat dictionary {'total_kimg': 25000, 'loss.r1_gamma': 10, ...} of the fields of TrainConfig and its
sections.
"""
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dnnlib.util import UserError
from training.config.presets import PRESETS
from training.config.schema import CUDA_GRAPHS, DEVICES, OPS, PRECISIONS
from training.config.sections import AUGMENT_MODES, CACHES
from training.config.values import (
    DatasetInfo,
    parse_duration,
    parse_formats,
    parse_metrics,
    parse_snap,
    parse_switch,
)

MAX_SEED = 2 ** 32 - 1
RESUME_ADA_KIMG = 100  # ADA moves faster when training starts from a trained network
HALF_PRECISION_LEVELS, HALF_PRECISION_CLAMP = 4, 256  # where a preset without half precision is asked for it

AUGMENT_GROUPS = {
    'blit': ('xflip', 'rotate90', 'xint'),
    'geom': ('scale', 'rotate', 'aniso', 'xfrac'),
    'color': ('brightness', 'contrast', 'lumaflip', 'hue', 'saturation'),
    'filter': ('imgfilter',),
    'noise': ('noise',),
    'cutout': ('cutout',),
}
# 'bgc' is the first three groups, and so on: the longer pipelines are named by the initials of their groups.
PIPELINES = {name: (name,) for name in AUGMENT_GROUPS} | {
    ''.join(name[0] for name in groups): groups for groups in (tuple(AUGMENT_GROUPS)[:n] for n in range(2, 7))
}
COLOR_CHANNELS = (1, 3, 4)  # numbers of channels for which colour means something

TRANSFER_FOLDER = ('https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/'
                   'transfer-learning-source-nets/')
TRANSFER_SOURCES = {
    'ffhq256': 'ffhq-res256-mirror-paper256-noaug.pkl',
    'ffhq512': 'ffhq-res512-mirror-stylegan2-noaug.pkl',
    'ffhq1024': 'ffhq-res1024-mirror-stylegan2-noaug.pkl',
    'celebahq256': 'celebahq-res256-mirror-paper256-kimg100000-ada-target0.5.pkl',
    'lsundog256': 'lsundog-res256-paper256-kimg100000-noaug.pkl',
}


@dataclass(frozen=True)
class Request:
    """What is asked for: flags by name with underscores (absent or None: not given), and the dataset."""

    flags: Mapping[str, Any]
    dataset: DatasetInfo

    def given(self, name: str) -> bool:
        """Whether the flag was given."""
        return self.flags.get(name) is not None

    @property
    def aug(self) -> str:
        """The augmentation mode."""
        preset = PRESETS.get(self.flags.get('cfg') or 'auto')
        return self.flags.get('aug') or ('ada' if preset is None else preset.aug)

    @property
    def epoch_nimg(self) -> int:
        """Pictures in the dataset as far as it is used, mirror images included."""
        count = min(self.flags.get('subset') or self.dataset.num_images, self.dataset.num_images)
        return 2 * count if self.flags.get('mirror') else count

    @property
    def gpus(self) -> int:
        """Number of processes, one a GPU."""
        return self.flags.get('gpus') or 1


Settings = dict[str, Any]
Setter = Callable[[Settings, Any, Request], None]


@dataclass(frozen=True)
class Option:
    """One flag.

    name: without dashes.  kind: int, float, bool, str, or the words to choose from.  default: what the help
    says happens without the flag.  minimum, maximum: inclusive.  paths: settings that take the value as it
    is.  setter: does whatever else is needed.  check: raises UserError, knowing nothing but the value.  slug:
    format of the part of the run's name, or a function that gives it; '' for none.
    """

    name: str
    kind: type | tuple[str, ...]
    group: str
    help: str
    default: str = ''
    minimum: float | None = None
    maximum: float | None = None
    paths: tuple[str, ...] = ()
    setter: Setter | None = None
    check: Callable[[Any], object] | None = None
    slug: str | Callable[[Any], str] = ''
    required: bool = False

    @property
    def key(self) -> str:
        """Name of the flag as a Python identifier."""
        return self.name.replace('-', '_')

    def validate(self, value: Any) -> None:
        """Raise UserError if the value alone is wrong."""
        flag = f'--{self.name}={value}'
        if isinstance(self.kind, tuple) and value not in self.kind:
            raise UserError(f'{flag} must be one of {", ".join(self.kind)}')
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f'{flag} must be a finite number')
        if self.minimum is not None and value < self.minimum:
            raise UserError(f'{flag} must be {self._bounds()}; nearest valid: {self.minimum:g}')
        if self.maximum is not None and value > self.maximum:
            raise UserError(f'{flag} must be {self._bounds()}; nearest valid: {self.maximum:.0f}')
        if self.check is not None:
            self.check(value)

    def _bounds(self) -> str:
        if self.maximum is None:
            return f'at least {self.minimum:g}'
        return f'between {self.minimum:g} and {self.maximum:.0f}'

    def apply(self, settings: Settings, value: Any, request: Request) -> None:
        """Change the settings as the flag asks. Raises UserError if it does not fit the other flags or the
        data.
        """
        for path in self.paths:
            settings[path] = value
        if self.setter is not None:
            self.setter(settings, value, request)

    def run_name_part(self, value: Any) -> str:
        """The part of the run's name, '' for none."""
        if callable(self.slug):
            return self.slug(value)
        return '' if value is False else self.slug.format(value)


def _set_snap(settings: Settings, value: str, _: Request) -> None:
    ticks, minutes = parse_snap(value)
    settings.update(image_snapshot_ticks=ticks, network_snapshot_ticks=ticks, snapshot_minutes=minutes)


def _set_metrics(settings: Settings, value: str, _: Request) -> None:
    settings['metrics'] = parse_metrics(value)


def _set_cond(settings: Settings, value: bool, request: Request) -> None:
    if value and not request.dataset.has_labels:
        raise UserError(f'--cond={value} needs labels, but {request.dataset.path} has none in dataset.json; '
                        'add them with dataset_tool.py --labels, or leave --cond out')
    settings['data.use_labels'] = value


def _set_subset(settings: Settings, value: int, request: Request) -> None:
    available = request.dataset.num_images
    if value > available:
        raise UserError(f'--subset={value} must be between 1 and {available}, the number of pictures in '
                        f'{request.dataset.path}; leave it out to use all')
    # A subset is drawn with the seed of the run, so that another seed trains on other pictures.
    if value < available:
        settings.update({'data.max_size': value, 'data.random_seed': settings['random_seed']})


def _set_batch(settings: Settings, value: int, request: Request) -> None:
    gpus = request.gpus
    if value % gpus:
        below = value // gpus * gpus
        nearest = f'{below} or {below + gpus}' if below else str(gpus)
        raise UserError(f'--batch={value} must be divisible by --gpus={gpus}; nearest valid: {nearest}')
    settings.update(batch_size=value, batch_gpu=value // gpus)


def _set_aug(settings: Settings, value: str, request: Request) -> None:
    if value == 'fixed' and not request.given('p'):
        raise UserError('--aug=fixed needs a probability; add --p=0..1, or use --aug=ada, which finds one')
    settings['augment.mode'] = value


def _set_p(settings: Settings, value: float, request: Request) -> None:
    if request.aug != 'fixed':
        raise UserError(f'--p={value:g} is ignored by --aug={request.aug}; add --aug=fixed or leave --p out')
    settings['augment.p'] = value


def _set_target(settings: Settings, value: float, request: Request) -> None:
    if request.aug != 'ada':
        raise UserError(f'--target={value:g} is for --aug=ada, not {request.aug}; leave one of them out')
    settings['augment.target'] = value


def _set_augpipe(settings: Settings, value: str, request: Request) -> None:
    if request.aug == 'noaug':
        raise UserError(f'--augpipe={value} has no effect with --aug=noaug; leave one of the two out')
    channels = request.dataset.channels
    if 'color' in PIPELINES[value] and channels not in COLOR_CHANNELS:
        raise UserError(f'--augpipe={value} changes colours, which pictures of {channels} channels do not '
                        'have; use --augpipe=bg')
    settings['augment.multipliers'] = pipeline_multipliers(value)


def pipeline_multipliers(pipeline: str) -> dict[str, float]:
    """Transform -> 1, for the transforms of a pipeline of --augpipe."""
    return {name: 1 for group in PIPELINES[pipeline] for name in AUGMENT_GROUPS[group]}


def continues(resume: str) -> bool:
    """Whether this value of --resume means a run to go on with, rather than networks to start from."""
    is_file = resume.lower().endswith(('.pkl', '.safetensors'))
    return not (is_file or '://' in resume or resume in TRANSFER_SOURCES or resume == 'noresume')


def _set_resume(settings: Settings, value: str, _: Request) -> None:
    if value == 'noresume' or continues(value):
        return
    # Trained weights need no ramp of the average, and overfit sooner, so augmentation must follow faster.
    url = TRANSFER_FOLDER + TRANSFER_SOURCES[value] if value in TRANSFER_SOURCES else value
    settings.update(resume_pkl=url, ada_kimg=RESUME_ADA_KIMG, ema_rampup=None)


def _resume_slug(value: str) -> str:
    if continues(value):
        return ''
    return value if value == 'noresume' else f'resume{value if value in TRANSFER_SOURCES else "custom"}'


def _set_fp32(settings: Settings, value: bool, request: Request) -> None:
    precision = request.flags.get('precision')
    if value and precision not in (None, 'auto', 'fp32'):
        raise UserError(f'--fp32={value} contradicts --precision={precision}; leave one of the two out')
    if value:
        _set_levels(settings, 0, None)


def _set_precision(settings: Settings, value: str, _: Request) -> None:
    settings['precision'] = value
    # Half precision without a bound on activations overflows, hence the clamp that comes with it.
    if value == 'fp32':
        _set_levels(settings, 0, None)
    elif value in ('fp16', 'bf16') and settings['G.num_fp16_res'] == 0:
        _set_levels(settings, HALF_PRECISION_LEVELS, HALF_PRECISION_CLAMP)


def _set_levels(settings: Settings, num_fp16_res: int, conv_clamp: float | None) -> None:
    for network in 'GD':
        settings.update({f'{network}.num_fp16_res': num_fp16_res, f'{network}.conv_clamp': conv_clamp})


def _set_formats(settings: Settings, value: str, _: Request) -> None:
    settings['snapshot_formats'] = parse_formats(value)


def _set_time_limit(settings: Settings, value: str, _: Request) -> None:
    settings['time_limit_sec'] = parse_duration(value)


def _set_nobench(settings: Settings, value: bool, _: Request) -> None:
    settings['cudnn_benchmark'] = not value


def _set_nhwc(settings: Settings, value: str | bool, _: Request) -> None:
    settings['G.channels_last'] = settings['D.channels_last'] = parse_switch('nhwc', value)


def _set_tf32(settings: Settings, value: str | bool, _: Request) -> None:
    settings['allow_tf32'] = parse_switch('allow-tf32', value)


def _check_desc(value: str) -> None:
    if not re.fullmatch(r'[\w.+=-]+', value):
        raise UserError(f'--desc={value} becomes part of a folder name; use letters, digits and . _ + = -')


BY_CFG = 'set by --cfg'
GENERAL, DATA, MODEL = 'General', 'Pictures', 'Networks and schedule'
AUGMENT, TRANSFER, SPEED = 'Augmentation', 'Transfer learning', 'Speed and memory'

OPTIONS: tuple[Option, ...] = (
    Option('outdir', str, GENERAL, 'Folder that gets one numbered folder for each run.', required=True),
    Option('gpus', int, GENERAL,
           'Number of GPUs, which divides the batch; with --device=cpu, of processes. torchrun decides it '
           'itself.', '1', minimum=1),
    Option('timeout', float, GENERAL,
           'Give up a run of several processes if they wait for one of them for so many seconds.', '600',
           minimum=0.1, paths=('timeout_sec',)),
    Option('snap', str, GENERAL, 'Save networks and sample pictures every so many ticks, or minutes: 30m.',
           BY_CFG + ', else 50', setter=_set_snap, check=parse_snap),
    Option('keep', int, GENERAL,
           'Keep so many of the latest saved networks, and the best by the first metric.',
           'all', minimum=1, paths=('keep',)),
    Option('snapshot-format', str, GENERAL, 'Files of saved networks, joined by commas: pkl, safetensors.',
           'pkl', setter=_set_formats, check=parse_formats),
    Option('time-limit', str, GENERAL, 'Save and stop, with exit status 75, after so long: 90m, 2-00:00:00.',
           setter=_set_time_limit, check=parse_duration),
    Option('metrics', str, GENERAL, 'Quality metrics of each saved network, joined by commas, or none.',
           BY_CFG + ', else fid50k_full', setter=_set_metrics, check=parse_metrics),
    Option('metrics-every', int, GENERAL, 'Compute them only for every so many saved networks.', '1',
           minimum=1, paths=('metrics_every',)),
    Option('detector-dir', str, GENERAL, 'Where feature networks of metrics are looked for first.',
           paths=('detector_dir',)),
    Option('wandb', bool, GENERAL, 'Also log to Weights & Biases; needs the package wandb.', 'no',
           paths=('wandb',)),
    Option('seed', int, GENERAL, 'Start of all random numbers.', '0', minimum=0, maximum=MAX_SEED,
           paths=('random_seed',)),
    Option('tick', float, GENERAL, 'Thousand pictures from one status line to the next.', BY_CFG + ', else 4',
           minimum=0.001, paths=('kimg_per_tick',)),
    Option('data', str, DATA,
           'Folder or .zip made by dataset_tool.py, or emoji32, which comes with the program.',
           required=True),
    Option('cond', bool, DATA, 'Learn to generate by label, from the labels in dataset.json.', 'no',
           setter=_set_cond, slug='cond'),
    Option('subset', int, DATA, 'Use only so many pictures, drawn at random.', 'all', minimum=1,
           setter=_set_subset, slug='subset{}'),
    Option('mirror', bool, DATA, 'Also use the mirror image of each picture.', 'no', paths=('data.xflip',),
           slug='mirror'),
    Option('cfg', tuple(PRESETS), MODEL,
           'Preset of all hyperparameters. auto chooses by picture size and number of GPUs; demo and '
           'stylegan1-demo are small enough for a CPU; stylegan1 and dcgan are other networks.', 'auto'),
    Option('gamma', float, MODEL, 'Weight of R1 regularisation, the setting most worth tuning.', BY_CFG,
           minimum=0, paths=('loss.r1_gamma',), slug='gamma{:g}'),
    Option('kimg', int, MODEL, 'Length of the training, in thousand pictures.', BY_CFG, minimum=1,
           paths=('total_kimg',), slug='kimg{}'),
    Option('batch', int, MODEL, 'Pictures in a training step, over all GPUs.', BY_CFG, minimum=1,
           setter=_set_batch, slug='batch{}'),
    Option('batch-gpu', int, MODEL, 'Pictures at a time on each GPU: fewer need less memory and more time.',
           '--batch / --gpus, else ' + BY_CFG, minimum=1, paths=('batch_gpu',)),
    Option('cbase', int, MODEL, 'Feature maps at level r: this number / r ...', BY_CFG, minimum=1,
           paths=('G.channel_base', 'D.channel_base'), slug='cbase{}'),
    Option('cmax', int, MODEL, '... but at most this number.', BY_CFG, minimum=1,
           paths=('G.channel_max', 'D.channel_max'), slug='cmax{}'),
    Option('map-depth', int, MODEL, 'Layers of the mapping network.', BY_CFG, minimum=1,
           paths=('G.map_layers',), slug='map{}'),
    Option('glr', float, MODEL, 'Learning rate of the generator.', BY_CFG, minimum=0, paths=('G_opt.lr',),
           slug='glr{:g}'),
    Option('dlr', float, MODEL, 'Learning rate of the discriminator.', BY_CFG, minimum=0, paths=('D_opt.lr',),
           slug='dlr{:g}'),
    Option('aug', AUGMENT_MODES, AUGMENT, 'none, adapted to overfitting (ADA), or of fixed probability.',
           'ada; noaug with --cfg=dcgan', setter=_set_aug, slug='{}'),
    Option('p', float, AUGMENT, 'Probability of each transform, for --aug=fixed.', minimum=0, maximum=1,
           setter=_set_p, slug='p{:g}'),
    Option('target', float, AUGMENT,
           'For --aug=ada: overfitting to aim at, as the mean sign of D on real pictures.', '0.6', minimum=0,
           maximum=1, setter=_set_target, slug='target{:g}'),
    Option('augpipe', tuple(PIPELINES), AUGMENT,
           'Kinds of transforms: one group, or several by their initials.',
           'bgc; bg where pictures have no colours', setter=_set_augpipe, slug='{}'),
    Option('resume', str, TRANSFER,
           'Go on with a run as if it had never stopped: latest (of --outdir), its folder, or a '
           'training-state-*.pt; other options then stay as they were. Or start from trained networks: .pkl, '
           f'URL, {", ".join(TRANSFER_SOURCES)}.', 'noresume', setter=_set_resume, slug=_resume_slug),
    Option('allow-changes', bool, TRANSFER, 'Go on with a run even if options make it another training.',
           'no'),
    Option('freezed', int, TRANSFER, 'Do not train so many layers of D, counted from the picture.', '0',
           minimum=0, paths=('D.freeze_layers',), slug='freezed{}'),
    Option('device', DEVICES, SPEED, 'auto takes a GPU if there is one.', 'auto', paths=('device',)),
    Option('precision', PRECISIONS, SPEED,
           'Arithmetic of the highest levels. auto: fp16 on a GPU, fp32 on a CPU.', 'auto',
           setter=_set_precision),
    Option('ops', OPS, SPEED,
           'Operators: cuda needs the compiled kernels, torch does without, auto takes them where it can.',
           'auto', paths=('ops',)),
    Option('cuda-graphs', CUDA_GRAPHS, SPEED,
           'Capture the work of a step once and repeat it: less for the CPU to do. auto: on a GPU.', 'auto',
           paths=('cuda_graphs',)),
    Option('compile', bool, SPEED,
           'Let torch.compile translate the networks, which takes minutes at the start and needs a C++ '
           'compiler. Regularisation phases stay as they are; CUDA graphs are off.', 'no',
           paths=('compile',)),
    Option('fp32', bool, SPEED, 'The same as --precision=fp32.', 'no', setter=_set_fp32),
    Option('nhwc', str, SPEED,
           'Memory format of 16-bit activations: 1 channels_last (NHWC), 0 NCHW. auto: NHWC on a GPU.',
           'auto', setter=_set_nhwc, check=functools.partial(parse_switch, 'nhwc')),
    Option('nobench', bool, SPEED, 'Do not let cuDNN try algorithms at the start.', 'no',
           setter=_set_nobench),
    Option('allow-tf32', str, SPEED,
           'TF32 arithmetic on the GPU: 1 for float32 convolutions and matrix products, 0 for neither. '
           'auto: for convolutions.', 'auto', setter=_set_tf32,
           check=functools.partial(parse_switch, 'allow-tf32')),
    Option('workers', int, SPEED, 'Processes or threads that read pictures.', '3', minimum=0,
           paths=('data.num_workers',)),
    Option('cache', CACHES, SPEED,
           'Where decoded pictures stay: in memory, on the GPU, nowhere. auto: where they are small.', 'auto',
           paths=('data.cache',)),
    Option('desc', str, GENERAL, "Words to add to the name of the run's folder.", check=_check_desc,
           slug='{}'),
)
