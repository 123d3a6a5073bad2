# SPDX-License-Identifier: Apache-2.0
"""All settings of a training run, and their published form: the dictionary in training_options.json."""
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dnnlib.util import UserError
from training.config.sections import (
    MAY_CHANGE,
    AugmentConfig,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    LossConfig,
    OptimizerConfig,
    changed,
    check_choice,
    check_minimum,
    construct,
    without_class_name,
)
from training.config.systems import SYSTEM_FORMS, SystemForm, read_sections, system_of
from training.config.values import split_resolution

PRECISIONS = ('auto', 'fp32', 'fp16', 'bf16')
DEVICES = ('auto', 'cuda', 'cpu')
OPS = ('auto', 'cuda', 'torch')
CUDA_GRAPHS = ('auto', 'on', 'off')


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run.

    run_dir: run directory.  image_snapshot_ticks, network_snapshot_ticks: ticks between snapshots, None for
    none.  metrics: names, evaluated for every `metrics_every`-th snapshot.  total_kimg: training length.
    batch_size: over all GPUs and passes; batch_gpu: per GPU and pass.  ema_kimg: half-life of the averaged
    generator; ema_rampup: limits it to this fraction of the images so far, None for no limit.  resume_pkl:
    path or URL of the weights to fine-tune from.  ada_kimg: kimg in which p can move by 1; ada_interval:
    iterations between its updates.  allow_tf32: for float32 convolutions and matrix products on GPU, None for
    convolutions only.  G_reg_interval, D_reg_interval: iterations between regularisation phases, None to
    regularise in every main phase.  snapshot_minutes: minutes between snapshots, instead of ticks.  keep:
    number of newest snapshots to keep besides the best, None for all.  time_limit_sec: save and stop after
    this time.  timeout_sec: abort once one process has stalled the others for this time.  ops: implementation
    of the custom ops.  cuda_graphs: whether phases are captured as CUDA graphs.  compile: whether main phases
    run networks compiled by torch.compile.  detector_dir: directory with feature networks of metrics.
    snapshot_formats: suffixes.  verbose: print options and layer tables.  num_threads: of each process
    on a CPU, None for its share of the cores.  system: networks and losses, see training.systems.table.
    Raises UserError for settings that cannot be trained.
    """

    run_dir: str = field(metadata=MAY_CHANGE)
    num_gpus: int
    image_snapshot_ticks: int | None = field(metadata=MAY_CHANGE)
    network_snapshot_ticks: int | None = field(metadata=MAY_CHANGE)
    metrics: tuple[str, ...] = field(metadata=MAY_CHANGE)
    random_seed: int
    data: DataConfig
    G: GeneratorConfig
    D: DiscriminatorConfig
    G_opt: OptimizerConfig
    D_opt: OptimizerConfig
    loss: LossConfig
    augment: AugmentConfig
    total_kimg: float = field(metadata=MAY_CHANGE)
    batch_size: int
    batch_gpu: int
    ema_kimg: float
    ema_rampup: float | None
    # The published dictionary has these, in this order, only if they differ from their defaults.
    resume_pkl: str | None = None
    ada_kimg: float = 500
    cudnn_benchmark: bool = field(default=True, metadata=MAY_CHANGE)
    allow_tf32: bool | None = None
    ada_interval: int = 4
    G_reg_interval: int | None = 4
    D_reg_interval: int | None = 16
    kimg_per_tick: float = field(default=4, metadata=MAY_CHANGE)
    precision: str = 'auto'
    device: str = field(default='auto', metadata=MAY_CHANGE)
    metrics_every: int = field(default=1, metadata=MAY_CHANGE)
    snapshot_minutes: float | None = field(default=None, metadata=MAY_CHANGE)
    wandb: bool = field(default=False, metadata=MAY_CHANGE)
    keep: int | None = field(default=None, metadata=MAY_CHANGE)
    time_limit_sec: float | None = field(default=None, metadata=MAY_CHANGE)
    timeout_sec: float = field(default=600, metadata=MAY_CHANGE)
    ops: str = field(default='auto', metadata=MAY_CHANGE)
    cuda_graphs: str = field(default='auto', metadata=MAY_CHANGE)
    compile: bool = field(default=False, metadata=MAY_CHANGE)
    detector_dir: str | None = field(default=None, metadata=MAY_CHANGE)
    snapshot_formats: tuple[str, ...] = field(default=('pkl',), metadata=MAY_CHANGE)
    verbose: bool = field(default=False, metadata=MAY_CHANGE)
    num_threads: int | None = field(default=None, metadata=MAY_CHANGE)
    # The class names in the dictionary say it.
    system: str = 'stylegan2'

    def __post_init__(self) -> None:
        check_minimum(self, 1, 'num_gpus', 'batch_size', 'batch_gpu')
        if not self.total_kimg > 0:
            raise UserError(f'total_kimg={self.total_kimg} must be above 0')
        check_choice('precision', self.precision, PRECISIONS)
        check_choice('device', self.device, DEVICES)
        check_choice('ops', self.ops, OPS)
        check_choice('cuda_graphs', self.cuda_graphs, CUDA_GRAPHS)
        check_choice('system', self.system, SYSTEM_FORMS)
        self._check_speed()
        self._check_batch()
        self._check_channels()

    def _check_speed(self) -> None:
        if self.cuda_graphs == 'on' and self.device == 'cpu':
            raise UserError('--cuda-graphs=on conflicts with --device=cpu; omit one of them')
        if self.cuda_graphs == 'on' and self.compile:
            raise UserError('--cuda-graphs=on conflicts with --compile=1; omit one of them')

    def _check_batch(self) -> None:
        if self.batch_size % (self.batch_gpu * self.num_gpus):
            share, rest = divmod(self.batch_size, self.num_gpus)
            valid = [str(n) for n in range(1, share + 1) if rest == 0 and share % n == 0]
            remedy = f'--batch-gpu={" or ".join(valid)}' if valid else f'a multiple of {self.num_gpus}'
            raise UserError(f'--batch={self.batch_size} must be divisible by --gpus={self.num_gpus} times '
                            f'--batch-gpu={self.batch_gpu}; use {remedy}')

    def _check_channels(self) -> None:
        # Layers of resolution r have channel_base // r feature maps.
        highest = 4 << split_resolution(*self.data.size)[2]
        for base in (self.G.channel_base, self.D.channel_base):
            if base < highest:
                raise UserError(f'--cbase={base} leaves the highest resolution without feature maps; use '
                                f'--cbase={highest} or more')
            self._form.check(self.data, base)

    @property
    def _form(self) -> SystemForm:
        return SYSTEM_FORMS[self.system]

    def G_kwargs(self) -> dict[str, Any]:
        """Constructor arguments of the generator, without c_dim, img_resolution and img_channels."""
        kwargs = self._form.G_kwargs(self.G, self.data)
        kwargs.get('synthesis_kwargs', {}).update(self._half_dtype())
        return kwargs

    def D_kwargs(self) -> dict[str, Any]:
        """Constructor arguments of the discriminator, without c_dim, img_resolution and img_channels."""
        kwargs = self._form.D_kwargs(self.D, self.data)
        kwargs.get('block_kwargs', {}).update(self._half_dtype())
        return kwargs

    def loss_kwargs(self) -> dict[str, Any]:
        """Constructor arguments of the loss that are settings."""
        return self._form.loss_kwargs(self.loss)

    def _half_dtype(self) -> dict[str, str]:
        return {'half_dtype': 'bfloat16'} if self.precision == 'bf16' else {}

    def augment_kwargs(self) -> dict[str, float]:
        """Constructor arguments of training.augment.AugmentPipe; empty without augmentation."""
        return dict(self.augment.multipliers)

    def for_device(self, device_type: str) -> 'TrainConfig':
        """Resolve --precision=auto for 'cuda' or 'cpu', where float16 would not be faster.

        Raises UserError for options that the device does not support.
        """
        if self.cuda_graphs == 'on' and device_type != 'cuda':
            raise UserError('--cuda-graphs=on: no GPU is available; use --cuda-graphs=auto')
        if self.precision != 'auto' or device_type != 'cpu':
            return self
        return dataclasses.replace(self, G=dataclasses.replace(self.G, num_fp16_res=0),
                                   D=dataclasses.replace(self.D, num_fp16_res=0))

    def to_options(self) -> dict[str, Any]:
        """The published dictionary, as JSON can hold it: published keys in their order, then our own."""
        form = self._form
        return {
            **{name: getattr(self, name) for name in _HEAD_FIELDS},
            'metrics': list(self.metrics), 'random_seed': self.random_seed,
            'training_set_kwargs': _named('training.dataset.ImageFolderDataset', self.data),
            'data_loader_kwargs': self.data.loader_kwargs(),
            'G_kwargs': {'class_name': form.generator, **form.G_kwargs(self.G, self.data)},
            'D_kwargs': {'class_name': form.discriminator, **form.D_kwargs(self.D, self.data)},
            'G_opt_kwargs': _named('torch.optim.Adam', self.G_opt),
            'D_opt_kwargs': _named('torch.optim.Adam', self.D_opt),
            'loss_kwargs': {'class_name': form.loss, **self.loss_kwargs()},
            **{name: getattr(self, name) for name in _SCHEDULE_FIELDS}, **self.augment.options(),
            **{name: list(value) if isinstance(value, tuple) else value
               for name, value in changed(self, *_OPTIONAL_FIELDS).items()},
            **changed(self.data, 'cache'), 'run_dir': self.run_dir,
        }

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> 'TrainConfig':
        """The inverse of `to_options`; also reads dictionaries of the published program.

        Raises UserError that names a missing or unknown key.
        """
        # Each section pops its keys; the remaining ones are fields of TrainConfig, or unknown.
        try:
            rest = dict(options)
            data, system = _read_data(rest), system_of(rest['G_kwargs'])
            settings = {
                'data': data, 'augment': AugmentConfig.from_options(rest), 'system': system,
                **read_sections(rest, system, data),
                'G_opt': _read_optimizer(rest.pop('G_opt_kwargs')),
                'D_opt': _read_optimizer(rest.pop('D_opt_kwargs')),
                'metrics': tuple(rest.pop('metrics')),
                'snapshot_formats': tuple(rest.pop('snapshot_formats', ('pkl',))),
            }
            return construct(cls, {**rest, **settings})
        except KeyError as error:
            raise UserError(f'training options lack {error.args[0]!r}') from error
        except (TypeError, AttributeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f'training options have a value of another type ({error})') from error


_HEAD_FIELDS = ('num_gpus', 'image_snapshot_ticks', 'network_snapshot_ticks')
_SCHEDULE_FIELDS = ('total_kimg', 'batch_size', 'batch_gpu', 'ema_kimg', 'ema_rampup')
_OPTIONAL_FIELDS = [f.name for f in dataclasses.fields(TrainConfig)
                    if f.default is not dataclasses.MISSING and f.name != 'system']


def _read_data(options: dict[str, Any]) -> DataConfig:
    kwargs = without_class_name(options.pop('training_set_kwargs'))
    # JSON has no tuples.
    if not isinstance(kwargs['resolution'], int):
        kwargs['resolution'] = tuple(kwargs['resolution'])
    if kwargs.get('class_names') is not None:
        kwargs['class_names'] = tuple(kwargs['class_names'])
    kwargs['num_workers'] = options.pop('data_loader_kwargs')['num_workers']
    return construct(DataConfig, kwargs | ({'cache': options.pop('cache')} if 'cache' in options else {}))


def _read_optimizer(kwargs: Mapping[str, Any]) -> OptimizerConfig:
    # Published files contain the integer 0, but Adam of current PyTorch refuses to mix it with a float.
    first, second = kwargs['betas']
    values = without_class_name(kwargs) | {'betas': (float(first), float(second))}
    return construct(OptimizerConfig, values)


def _named(class_name: str, section: Any) -> dict[str, Any]:
    return {'class_name': class_name, **section.kwargs()}
