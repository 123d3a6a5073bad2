# SPDX-License-Identifier: Apache-2.0
"""What a training run is, and its published form: the dictionary that training_options.json holds."""
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dnnlib.util import UserError
from training.config.sections import (
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
# Settings of this project: in the dictionary only where they differ from the defaults of TrainConfig.
OWN_SETTINGS = ('ada_interval', 'G_reg_interval', 'D_reg_interval', 'kimg_per_tick', 'precision', 'device',
                'metrics_every', 'snapshot_minutes', 'wandb', 'keep', 'time_limit_sec', 'timeout_sec', 'ops',
                'cuda_graphs', 'compile', 'detector_dir')
TAIL_SETTINGS = ('resume_pkl', 'ada_kimg', 'cudnn_benchmark', 'allow_tf32', *OWN_SETTINGS)


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run is made from.

    run_dir: its folder.  image_snapshot_ticks, network_snapshot_ticks: ticks between snapshots, None for
    none.  snapshot_minutes: instead, minutes between both.  metrics: names, computed at every
    `metrics_every`-th network snapshot.  wandb: log to Weights & Biases, too.  total_kimg: length, in
    thousand pictures.  batch_size: pictures a step; batch_gpu: of these at a time on each device.  ema_kimg:
    half-life of the averaged generator; ema_rampup: limits it to this share of the pictures so far, None for
    no limit.  ada_kimg: thousand pictures in which p can move by 1; ada_interval: steps between its moves.
    G_reg_interval, D_reg_interval: steps between regularisations, None: in every step.  resume_pkl: path or
    URL of the networks to start from.  keep: network snapshots that stay besides the best, None for all.
    time_limit_sec: the run saves itself and stops after so many seconds.  timeout_sec: a process that the
    others wait for so long ends it.  allow_tf32: TF32 on a GPU, in float32 convolutions and matrix products;
    None: in convolutions only.  ops: which implementation operators have.  cuda_graphs: whether phases
    run as captured graphs.  compile: whether main phases run networks compiled by torch.compile.
    detector_dir: folder with feature networks of metrics.  snapshot_formats: suffixes of the files of saved
    networks.  system: which networks and losses, see training.systems.table.
    Raises UserError for what cannot be trained.
    """

    run_dir: str
    num_gpus: int
    image_snapshot_ticks: int | None
    network_snapshot_ticks: int | None
    metrics: tuple[str, ...]
    random_seed: int
    data: DataConfig
    G: GeneratorConfig
    D: DiscriminatorConfig
    G_opt: OptimizerConfig
    D_opt: OptimizerConfig
    loss: LossConfig
    augment: AugmentConfig
    total_kimg: float
    batch_size: int
    batch_gpu: int
    ema_kimg: float
    ema_rampup: float | None
    ada_kimg: float = 500
    ada_interval: int = 4
    G_reg_interval: int | None = 4
    D_reg_interval: int | None = 16
    kimg_per_tick: float = 4
    resume_pkl: str | None = None
    cudnn_benchmark: bool = True
    allow_tf32: bool | None = None
    precision: str = 'auto'
    device: str = 'auto'
    metrics_every: int = 1
    snapshot_minutes: float | None = None
    wandb: bool = False
    keep: int | None = None
    time_limit_sec: float | None = None
    timeout_sec: float = 600
    ops: str = 'auto'
    cuda_graphs: str = 'auto'
    compile: bool = False
    detector_dir: str | None = None
    snapshot_formats: tuple[str, ...] = ('pkl',)
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
            raise UserError('--cuda-graphs=on does not go with --device=cpu; leave one of them out')
        if self.cuda_graphs == 'on' and self.compile:
            raise UserError('--cuda-graphs=on does not go with --compile=1; leave one of them out')

    def _check_batch(self) -> None:
        if self.batch_size % (self.batch_gpu * self.num_gpus):
            share, rest = divmod(self.batch_size, self.num_gpus)
            valid = [str(n) for n in range(1, share + 1) if rest == 0 and share % n == 0]
            remedy = f'--batch-gpu={" or ".join(valid)}' if valid else f'a multiple of {self.num_gpus}'
            raise UserError(f'--batch={self.batch_size} must be divisible by --gpus={self.num_gpus} times '
                            f'--batch-gpu={self.batch_gpu}; use {remedy}')

    def _check_channels(self) -> None:
        # A level has channel_base // level feature maps.
        highest_level = 4 << split_resolution(*self.data.size)[2]
        for base in (self.G.channel_base, self.D.channel_base):
            if base < highest_level:
                raise UserError(f'--cbase={base} leaves the highest level without feature maps; use '
                                f'--cbase={highest_level} or more')
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
        """Constructor arguments of the losses, as far as they are settings."""
        return self._form.loss_kwargs(self.loss)

    def _half_dtype(self) -> dict[str, str]:
        return {'half_dtype': 'bfloat16'} if self.precision == 'bf16' else {}

    def augment_kwargs(self) -> dict[str, float]:
        """Constructor arguments of training.augment.AugmentPipe; empty without augmentation."""
        return dict(self.augment.multipliers)

    def for_device(self, device_type: str) -> 'TrainConfig':
        """Decide --precision=auto for 'cuda' or 'cpu'. A CPU gains nothing from float16.

        Raises UserError if the device cannot do what is asked for.
        """
        if self.cuda_graphs == 'on' and device_type != 'cuda':
            raise UserError('--cuda-graphs=on: there is no GPU here; use --cuda-graphs=auto')
        if self.precision != 'auto' or device_type != 'cpu':
            return self
        return dataclasses.replace(self, G=dataclasses.replace(self.G, num_fp16_res=0),
                                   D=dataclasses.replace(self.D, num_fp16_res=0))

    def to_options(self) -> dict[str, Any]:
        """The published dictionary, which JSON can hold: its keys in its order, then the settings of this
        project.
        """
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
            **changed(self, *TAIL_SETTINGS), **self._formats(), **changed(self.data, 'cache'),
            'run_dir': self.run_dir,
        }

    def _formats(self) -> dict[str, list[str]]:
        return {key: list(value) for key, value in changed(self, 'snapshot_formats').items()}

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> 'TrainConfig':
        """Read a dictionary made by `to_options` or by the published program.

        Raises UserError that names a key that is missing or unknown.
        """
        # Each section takes its keys out; what is left are fields of TrainConfig, or unknown.
        rest = dict(options)
        try:
            data, system = _read_data(rest), system_of(rest['G_kwargs'])
            settings = {
                'data': data, 'augment': AugmentConfig.from_options(rest), 'system': system,
                **read_sections(rest, system, data),
                'G_opt': _read_optimizer(rest.pop('G_opt_kwargs')),
                'D_opt': _read_optimizer(rest.pop('D_opt_kwargs')),
                'metrics': tuple(rest.pop('metrics')),
                'snapshot_formats': tuple(rest.pop('snapshot_formats', ('pkl',))),
            }
        except KeyError as error:
            raise UserError(f'training options lack {error.args[0]!r}') from error
        return construct(cls, {**rest, **settings})


_HEAD_FIELDS = ('num_gpus', 'image_snapshot_ticks', 'network_snapshot_ticks')
_SCHEDULE_FIELDS = ('total_kimg', 'batch_size', 'batch_gpu', 'ema_kimg', 'ema_rampup')


def _read_data(options: dict[str, Any]) -> DataConfig:
    kwargs = without_class_name(options.pop('training_set_kwargs'))
    # JSON has no tuples.
    if not isinstance(kwargs['resolution'], int):
        kwargs['resolution'] = tuple(kwargs['resolution'])
    kwargs['num_workers'] = options.pop('data_loader_kwargs')['num_workers']
    return construct(DataConfig, kwargs | ({'cache': options.pop('cache')} if 'cache' in options else {}))


def _read_optimizer(kwargs: Mapping[str, Any]) -> OptimizerConfig:
    # Published files hold the integer 0, which Adam of current PyTorch refuses beside a float.
    first, second = kwargs['betas']
    values = without_class_name(kwargs) | {'betas': (float(first), float(second))}
    return construct(OptimizerConfig, values)


def _named(class_name: str, section: Any) -> dict[str, Any]:
    return {'class_name': class_name, **section.kwargs()}
