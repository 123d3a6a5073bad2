# SPDX-License-Identifier: Apache-2.0
"""The options of train.py, one row per option, in the order of the checks, the help and the run's name.

A row defines the click option, its check, its effect on the settings and its part of the run's name. Settings
are a flat dictionary {'total_kimg': 25000, 'loss.r1_gamma': 10, ...} of the fields of TrainConfig and its
sections.
"""
import functools
import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dnnlib.util import UserError
from training.config.presets import PRESETS
from training.config.schema import CUDA_GRAPHS, DEVICES, OPS, PRECISIONS
from training.config.sections import AUGMENT_MODES, CACHES
from training.config.values import (
    DatasetInfo,
    parse_duration,
    parse_folder,
    parse_formats,
    parse_metrics,
    parse_snap,
    parse_switch,
)

MAX_SEED = 2 ** 32 - 1
MAX_THREADS = 1024
RESUME_ADA_KIMG = 100  # ADA adapts faster when fine-tuning
HALF_PRECISION_LEVELS, HALF_PRECISION_CLAMP = 4, 256  # for --precision with a preset in float32

# How files of --resume are told apart: suffixes of weights, the name and the end of a training state.
WEIGHT_SUFFIXES = ('.pkl', '.safetensors', '.pt', '.pth', '.ckpt')
STATE_PREFIX, OPTIONS_FILE = 'training-state-', 'training_options.json'
STATE_ENDING = re.compile(rb'sha256:[0-9a-f]{64}')
STATE_ENDING_SIZE = 71

AUGMENT_GROUPS = {
    'blit': ('xflip', 'rotate90', 'xint'),
    'geom': ('scale', 'rotate', 'aniso', 'xfrac'),
    'color': ('brightness', 'contrast', 'lumaflip', 'hue', 'saturation'),
    'filter': ('imgfilter',),
    'noise': ('noise',),
    'cutout': ('cutout',),
}
# Longer pipelines are named by the initials of their groups: 'bgc' is the first three, and so on.
PIPELINES = {name: (name,) for name in AUGMENT_GROUPS} | {
    ''.join(name[0] for name in groups): groups for groups in (tuple(AUGMENT_GROUPS)[:n] for n in range(2, 7))
}
COLOR_CHANNELS = (1, 3, 4)  # numbers of channels that colour transforms can handle

TRANSFER_FOLDER = ('https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/'
                   'transfer-learning-source-nets/')
TRANSFER_SOURCES = {
    'emoji32': None,  # in this package
    'ffhq256': 'ffhq-res256-mirror-paper256-noaug.pkl',
    'ffhq512': 'ffhq-res512-mirror-stylegan2-noaug.pkl',
    'ffhq1024': 'ffhq-res1024-mirror-stylegan2-noaug.pkl',
    'celebahq256': 'celebahq-res256-mirror-paper256-kimg100000-ada-target0.5.pkl',
    'lsundog256': 'lsundog-res256-paper256-kimg100000-noaug.pkl',
}


@dataclass(frozen=True)
class Request:
    """Flags by name with underscores (absent or None: not given), and the dataset."""

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
        """Images per epoch: the subset in use, mirror images included."""
        count = min(self.flags.get('subset') or self.dataset.num_images, self.dataset.num_images)
        return 2 * count if self.flags.get('mirror') else count

    @property
    def gpus(self) -> int:
        """Number of processes, one per GPU."""
        return self.flags.get('gpus') or 1


Settings = dict[str, Any]
Setter = Callable[[Settings, Any, Request], None]


@dataclass(frozen=True)
class Option:
    """One option.

    name: without dashes.  kind: int, float, bool, str, or the choices.  default: as shown in the help.
    minimum, maximum: inclusive.  parse: turns the value into what the settings hold; raises UserError.
    paths: settings that take the parsed value.  setter: checks and effects that depend on other options or
    the dataset; raises UserError.  also: further settings that the setter, or the dataset of --data, decides.
    slug: format of the part of the run's name, or a function that returns it; '' for none.
    """

    name: str
    kind: type | tuple[str, ...]
    group: str
    help: str
    default: str = ''
    minimum: float | None = None
    maximum: float | None = None
    parse: Callable[[Any], object] | None = None
    paths: tuple[str, ...] = ()
    setter: Setter | None = None
    also: tuple[str, ...] = ()
    slug: str | Callable[[Any], str] = ''
    required: bool = False

    @property
    def key(self) -> str:
        """Name of the option as a Python identifier."""
        return self.name.replace('-', '_')

    @property
    def types(self) -> tuple[type, ...]:
        """Of values, as JSON has them."""
        if isinstance(self.kind, tuple):
            return (str,)
        return (int, float) if self.kind is float else (self.kind,)

    def read(self, value: Any) -> Any:
        """The value as the settings hold it. Raises UserError if it is wrong on its own."""
        flag = f'--{self.name}={value}'
        if isinstance(self.kind, tuple) and value not in self.kind:
            raise UserError(f'{flag} must be one of {", ".join(self.kind)}')
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f'{flag} must be a finite number')
        if self.minimum is not None and value < self.minimum:
            raise UserError(f'{flag} must be {self._bounds()}; nearest valid: {self.minimum:g}')
        if self.maximum is not None and value > self.maximum:
            raise UserError(f'{flag} must be {self._bounds()}; nearest valid: {self.maximum:.0f}')
        return value if self.parse is None else self.parse(value)

    def _bounds(self) -> str:
        if self.maximum is None:
            return f'at least {self.minimum:g}'
        return f'between {self.minimum:g} and {self.maximum:.0f}'

    def apply(self, settings: Settings, value: Any, request: Request) -> None:
        """Change the settings; value: from `read`.

        Raises UserError if it conflicts with other options or the dataset.
        """
        for path in self.paths:
            settings[path] = value
        if self.setter is not None:
            self.setter(settings, value, request)

    def run_name_part(self, value: Any) -> str:
        """The part of the run's name, '' for none; value: as given."""
        if callable(self.slug):
            return self.slug(value)
        return '' if value is False else self.slug.format(value)


def _set_snap(settings: Settings, value: tuple[int | None, float | None], _: Request) -> None:
    ticks, minutes = value
    settings.update(image_snapshot_ticks=ticks, network_snapshot_ticks=ticks, snapshot_minutes=minutes)


def _set_cond(settings: Settings, value: bool, request: Request) -> None:
    if value and not request.dataset.has_labels:
        raise UserError(f'--cond={value} needs labels, but {request.dataset.path} has none in dataset.json; '
                        'add them with dataset_tool.py --labels, or omit --cond')
    if value:
        settings['data.class_names'] = request.dataset.class_names


def _set_subset(settings: Settings, value: int, request: Request) -> None:
    available = request.dataset.num_images
    if value > available:
        raise UserError(f'--subset={value} must be between 1 and {available}, the number of images in '
                        f'{request.dataset.path}; omit it to use all')
    # The subset depends on the random seed of the run.
    if value < available:
        settings.update({'data.max_size': value, 'data.random_seed': settings['random_seed']})


def _set_batch(settings: Settings, value: int, request: Request) -> None:
    gpus = request.gpus
    if value % gpus:
        below = value // gpus * gpus
        nearest = f'{below} or {below + gpus}' if below else str(gpus)
        raise UserError(f'--batch={value} must be divisible by --gpus={gpus}; nearest valid: {nearest}')
    settings['batch_gpu'] = value // gpus


def _check_aug(_: Settings, value: str, request: Request) -> None:
    if value == 'fixed' and not request.given('p'):
        raise UserError('--aug=fixed needs a probability; add --p=0..1, or use --aug=ada, which adapts it')


def _check_p(_: Settings, value: float, request: Request) -> None:
    if request.aug != 'fixed':
        raise UserError(f'--p={value:g} is ignored by --aug={request.aug}; add --aug=fixed or omit --p')


def _check_target(_: Settings, value: float, request: Request) -> None:
    if request.aug != 'ada':
        raise UserError(f'--target={value:g} requires --aug=ada, not {request.aug}; omit one of the two')


def _set_augpipe(settings: Settings, value: str, request: Request) -> None:
    if request.aug == 'noaug':
        raise UserError(f'--augpipe={value} has no effect with --aug=noaug; omit one of the two')
    channels = request.dataset.channels
    if 'color' in PIPELINES[value] and channels not in COLOR_CHANNELS:
        raise UserError(f'--augpipe={value} changes colours, which images of {channels} channels do not '
                        'have; use --augpipe=bg')
    settings['augment.multipliers'] = pipeline_multipliers(value)


def pipeline_multipliers(pipeline: str) -> dict[str, float]:
    """{transform: 1} for all transforms of a pipeline of --augpipe."""
    return {name: 1 for group in PIPELINES[pipeline] for name in AUGMENT_GROUPS[group]}


def continues(resume: str) -> bool:
    """Whether this value of --resume names a run to resume, not weights to fine-tune from.

    A training state without the files of its run beside it counts as weights.
    """
    if '://' in resume or resume in TRANSFER_SOURCES or resume == 'noresume':
        return False
    path = Path(resume)
    if path.is_file():
        return _is_state(path) and (path.parent / OPTIONS_FILE).is_file()
    return not resume.lower().endswith(WEIGHT_SUFFIXES) or path.is_dir() or path.name.startswith(STATE_PREFIX)


def _is_state(path: Path) -> bool:
    """Whether a file is a training state, by its name or its end."""
    if path.name.startswith(STATE_PREFIX):
        return path.suffix == '.pt'
    try:
        with path.open('rb') as file:
            file.seek(max(0, path.stat().st_size - STATE_ENDING_SIZE))
            return STATE_ENDING.fullmatch(file.read()) is not None
    except OSError:
        return False


def _parse_resume(value: str) -> str:
    if not value:
        raise UserError('--resume= is empty; give latest, a run directory, a network file, or noresume')
    return value


def _set_resume(settings: Settings, value: str, _: Request) -> None:
    if value == 'noresume' or continues(value):
        return
    # Pretrained weights need no EMA ramp-up, and overfit sooner, so p must adapt faster.
    file = TRANSFER_SOURCES.get(value)
    url = value if file is None else TRANSFER_FOLDER + file
    settings.update(resume_pkl=url, ada_kimg=RESUME_ADA_KIMG, ema_rampup=None)


def _resume_slug(value: str) -> str:
    if continues(value):
        return ''
    return value if value == 'noresume' else f'resume{value if value in TRANSFER_SOURCES else "custom"}'


def _set_fp32(settings: Settings, value: bool, request: Request) -> None:
    precision = request.flags.get('precision')
    if value and precision not in (None, 'auto', 'fp32'):
        raise UserError(f'--fp32={value} contradicts --precision={precision}; omit one of the two')
    if value:
        _set_levels(settings, 0, None)


def _set_precision(settings: Settings, value: str, _: Request) -> None:
    # Half precision overflows unless activations are clamped.
    if value == 'fp32':
        _set_levels(settings, 0, None)
    elif value in ('fp16', 'bf16') and settings['G.num_fp16_res'] == 0:
        _set_levels(settings, HALF_PRECISION_LEVELS, HALF_PRECISION_CLAMP)


def _set_levels(settings: Settings, num_fp16_res: int, conv_clamp: float | None) -> None:
    for network in 'GD':
        settings.update({f'{network}.num_fp16_res': num_fp16_res, f'{network}.conv_clamp': conv_clamp})


def _parse_desc(value: str) -> str:
    # The name of a folder may not consist of dots, which would also be lost at its end on Windows.
    if not re.fullmatch(r'[\w.+=-]*[\w+=-]', value):
        raise UserError(f'--desc={value} becomes part of a directory name; use letters, digits and . _ + = -')
    return value


BY_CFG = 'set by --cfg'
GENERAL, DATA, MODEL = 'General', 'Dataset', 'Networks and schedule'
AUGMENT, TRANSFER, SPEED = 'Augmentation', 'Resume and transfer learning', 'Speed and memory'

OPTIONS: tuple[Option, ...] = (
    Option('outdir', str, GENERAL, 'Directory for results: each run gets a numbered run directory in it.',
           required=True),
    Option('gpus', int, GENERAL,
           'Number of GPUs, or of processes with --device=cpu; must divide --batch. torchrun overrides it.',
           '1', minimum=1, paths=('num_gpus',)),
    Option('timeout', float, GENERAL, 'Abort once one process has stalled the others for this many seconds.',
           '600', minimum=0.1, paths=('timeout_sec',)),
    Option('snap', str, GENERAL,
           'Interval between snapshots and sample sheets, in ticks, or in minutes (30m).',
           BY_CFG + ', else 50', parse=parse_snap, setter=_set_snap,
           also=('image_snapshot_ticks', 'network_snapshot_ticks', 'snapshot_minutes')),
    Option('keep', int, GENERAL, 'Keep only the newest N snapshots and the best one by the first metric.',
           'all', minimum=1, paths=('keep',)),
    Option('snapshot-format', str, GENERAL, 'File formats of snapshots, comma-separated: pkl, safetensors.',
           'pkl', parse=parse_formats, paths=('snapshot_formats',)),
    Option('time-limit', str, GENERAL,
           'Save the training state and exit with status 75 after this long: 90m, 2-00:00:00.',
           parse=parse_duration, paths=('time_limit_sec',)),
    Option('metrics', str, GENERAL, 'Metrics to evaluate for each snapshot, comma-separated, or none.',
           BY_CFG + ', else fid50k_full', parse=parse_metrics, paths=('metrics',)),
    Option('metrics-every', int, GENERAL, 'Evaluate the metrics only for every N-th snapshot.', '1',
           minimum=1, paths=('metrics_every',)),
    Option('detector-dir', str, GENERAL, 'Directory to search first for the feature networks of metrics.',
           parse=functools.partial(parse_folder, 'detector-dir'), paths=('detector_dir',)),
    Option('wandb', bool, GENERAL, 'Also log to Weights & Biases; requires the package wandb.', 'no',
           paths=('wandb',)),
    Option('verbose', bool, GENERAL,
           'Print all options and the layers of the networks, which are also in the run directory.', 'no',
           paths=('verbose',)),
    Option('seed', int, GENERAL, 'Random seed.', '0', minimum=0, maximum=MAX_SEED, paths=('random_seed',)),
    Option('tick', float, GENERAL, 'Interval between status lines, in kimg.', BY_CFG + ', else 4',
           minimum=0.001, paths=('kimg_per_tick',)),
    Option('data', str, DATA,
           'Training images: directory or .zip made by dataset_tool.py, or bundled ones: emoji32, smileys.',
           required=True, also=('data.path', 'data.max_size', 'data.resolution')),
    Option('cond', bool, DATA, 'Train a conditional model on the labels in dataset.json.', 'no',
           paths=('data.use_labels',), setter=_set_cond, also=('data.class_names',), slug='cond'),
    Option('strict', bool, DATA,
           'Refuse a dataset of which something is not used, such as unreadable formats.', 'no'),
    Option('subset', int, DATA, 'Train on a random subset of N images.', 'all', minimum=1, setter=_set_subset,
           also=('data.max_size', 'data.random_seed'), slug='subset{}'),
    Option('mirror', bool, DATA, 'Add a mirrored copy of each training image.', 'no', paths=('data.xflip',),
           slug='mirror'),
    Option('cfg', tuple(PRESETS), MODEL,
           'Preset of all hyperparameters. auto: chosen by image size and number of GPUs; demo, '
           'stylegan1-demo: small enough for a CPU; stylegan1, dcgan: other architectures.', 'auto'),
    Option('gamma', float, MODEL, 'Weight of R1 regularisation, the hyperparameter most worth tuning.',
           BY_CFG, minimum=0, paths=('loss.r1_gamma',), slug='gamma{:g}'),
    Option('kimg', int, MODEL, 'Training length, in kimg.', BY_CFG, minimum=1, paths=('total_kimg',),
           slug='kimg{}'),
    Option('batch', int, MODEL, 'Total batch size over all GPUs.', BY_CFG, minimum=1, paths=('batch_size',),
           setter=_set_batch, slug='batch{}'),
    Option('batch-gpu', int, MODEL,
           'Batch size per GPU and pass. Smaller values accumulate gradients: less memory, more time.',
           '--batch / --gpus, else ' + BY_CFG, minimum=1, paths=('batch_gpu',)),
    Option('cbase', int, MODEL,
           'Channel multiplier: layers at resolution r have cbase / r feature maps, at most --cmax.', BY_CFG,
           minimum=1, paths=('G.channel_base', 'D.channel_base'), slug='cbase{}'),
    Option('cmax', int, MODEL, 'Maximum number of feature maps per layer.', BY_CFG, minimum=1,
           paths=('G.channel_max', 'D.channel_max'), slug='cmax{}'),
    Option('map-depth', int, MODEL, 'Number of layers of the mapping network.', BY_CFG, minimum=1,
           paths=('G.map_layers',), slug='map{}'),
    Option('glr', float, MODEL, 'Learning rate of G.', BY_CFG, minimum=0, paths=('G_opt.lr',),
           slug='glr{:g}'),
    Option('dlr', float, MODEL, 'Learning rate of D.', BY_CFG, minimum=0, paths=('D_opt.lr',),
           slug='dlr{:g}'),
    Option('aug', AUGMENT_MODES, AUGMENT, 'Augmentation: off, adaptive (ADA), or a fixed probability.',
           'ada; noaug with --cfg=dcgan', paths=('augment.mode',), setter=_check_aug, slug='{}'),
    Option('p', float, AUGMENT, 'Probability of each transform, with --aug=fixed.', minimum=0, maximum=1,
           paths=('augment.p',), setter=_check_p, slug='p{:g}'),
    Option('target', float, AUGMENT,
           'Target of ADA, with --aug=ada: mean sign of D on real images.', '0.6', minimum=0,
           maximum=1, paths=('augment.target',), setter=_check_target, slug='target{:g}'),
    Option('augpipe', tuple(PIPELINES), AUGMENT,
           'Augmentation pipeline: one group of transforms, or several by their initials.',
           'bgc; bg for images without colour', setter=_set_augpipe, also=('augment.multipliers',),
           slug='{}'),
    Option('resume', str, TRANSFER,
           'Resume a run: latest (in --outdir), its run directory, or a training-state-*.pt; options that '
           'are not given keep their values. Or fine-tune from weights: any network file, URL, '
           f'{", ".join(TRANSFER_SOURCES)}.', 'noresume', parse=_parse_resume, setter=_set_resume,
           also=('resume_pkl',), slug=_resume_slug),
    Option('allow-changes', bool, TRANSFER, 'Resume even if options that affect training have changed.',
           'no'),
    Option('freezed', int, TRANSFER, 'Freeze the first N layers of D (Freeze-D).', '0', minimum=0,
           paths=('D.freeze_layers',), slug='freezed{}'),
    Option('device', DEVICES, SPEED, 'Device. auto: GPU if available.', 'auto', paths=('device',)),
    Option('precision', PRECISIONS, SPEED,
           'Precision of the highest-resolution layers. auto: fp16 on GPU, fp32 on CPU.', 'auto',
           paths=('precision',), setter=_set_precision,
           also=('G.num_fp16_res', 'D.num_fp16_res', 'G.conv_clamp', 'D.conv_clamp')),
    Option('ops', OPS, SPEED,
           'Custom ops. cuda: require the CUDA kernels; torch: plain PyTorch; auto: kernels where available.',
           'auto', paths=('ops',)),
    Option('cuda-graphs', CUDA_GRAPHS, SPEED,
           'Replay training steps as CUDA graphs, which reduces CPU overhead. auto: on GPU.', 'auto',
           paths=('cuda_graphs',)),
    Option('compile', bool, SPEED,
           'Compile the networks with torch.compile, except in regularisation phases: takes minutes at the '
           'start, needs a C++ compiler, and disables CUDA graphs.', 'no', paths=('compile',)),
    Option('fp32', bool, SPEED, 'Same as --precision=fp32.', 'no', setter=_set_fp32),
    Option('nhwc', str, SPEED,
           'Memory format of 16-bit activations. 1: channels_last (NHWC); 0: NCHW; auto: NHWC on GPU.',
           'auto', parse=functools.partial(parse_switch, 'nhwc'),
           paths=('G.channels_last', 'D.channels_last')),
    Option('nobench', bool, SPEED, 'Disable cuDNN benchmarking.', 'no', parse=operator.not_,
           paths=('cudnn_benchmark',)),
    Option('allow-tf32', str, SPEED,
           'TF32 on GPU. 1: for float32 convolutions and matrix products; 0: off; auto: for convolutions.',
           'auto', parse=functools.partial(parse_switch, 'allow-tf32'), paths=('allow_tf32',)),
    Option('threads', int, SPEED, 'Number of CPU threads of each process.', 'its share of the cores',
           minimum=1, maximum=MAX_THREADS, paths=('num_threads',)),
    Option('workers', int, SPEED, 'Number of processes or threads that load data.', '3', minimum=0,
           paths=('data.num_workers',)),
    Option('cache', CACHES, SPEED,
           'Cache decoded images in RAM or GPU memory. auto: for small datasets.', 'auto',
           paths=('data.cache',)),
    Option('desc', str, GENERAL, 'Text to append to the name of the run directory.', parse=_parse_desc,
           slug='{}'),
)
