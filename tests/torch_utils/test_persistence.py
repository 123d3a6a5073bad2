# SPDX-License-Identifier: Apache-2.0
"""Persistent classes: what they remember, what their pickles hold, and who can open these."""
import copy
import importlib
import pickle
import sys
import textwrap

import pytest
import torch
from elsewhere import open_elsewhere

from dnnlib.util import EasyDict, UserError
from torch_utils import persistence
from training import augment, networks
from training.formats import pickled

SHAPE = '''
    from torch_utils import persistence

    @persistence.persistent_class
    class Shape:
        """A shape."""

        def __init__(self, sides, name='x', options=None):
            self.sides, self.name = sides, name

        def describe(self):
            return f'{self.name} has {self.sides} sides'
'''


@pytest.fixture
def make_module(tmp_path, monkeypatch):
    """Function: import a module of this text under this name; everything is undone after the test."""
    monkeypatch.syspath_prepend(tmp_path)
    for table in ('_sources', '_modules', '_companions'):
        monkeypatch.setattr(persistence, table, dict(getattr(persistence, table)))
    monkeypatch.setattr(persistence, '_hooks', [])
    before = set(sys.modules)

    def make(name, text):
        path = tmp_path.joinpath(*name.split('.')).with_suffix('.py')
        path.parent.mkdir(exist_ok=True)
        path.write_text(textwrap.dedent(text))
        importlib.invalidate_caches()
        return importlib.import_module(name)
    yield make
    for name in set(sys.modules) - before:
        if name.partition('.')[0] in ('shapes', 'parts', '_imported_module_'):
            del sys.modules[name]


def forget(*names):
    """Make these modules unknown to the program, as they are in another one."""
    for name in names:
        persistence._modules.pop(persistence._sources.pop(name, None), None)
        persistence._companions.pop(name, None)
        sys.modules.pop(name, None)


def test_arguments_are_remembered_as_deep_copies(make_module):
    sides = [3, 4]
    shape = make_module('shapes', SHAPE).Shape(sides, name='both')
    sides.append(5)
    shape.init_kwargs.name = 'changed'
    assert shape.init_args == ([3, 4],)
    assert isinstance(shape.init_kwargs, EasyDict) and shape.init_kwargs == {'name': 'both'}
    assert type(shape)(*shape.init_args, **shape.init_kwargs).describe() == 'both has [3, 4] sides'


def test_dictionaries_among_the_arguments_have_attributes_in_every_program(make_module):
    shape = make_module('shapes', SHAPE).Shape(3, options={'a': {'b': 1}})
    forget('shapes')
    for kwargs in (shape.init_kwargs, pickle.loads(pickle.dumps(shape))._init_kwargs):
        kwargs['options'].a.b = 2
        assert type(kwargs['options'].a) is EasyDict and kwargs == {'options': {'a': {'b': 2}}}
    assert shape.init_kwargs == {'options': {'a': {'b': 1}}}


def test_the_decorated_class_looks_like_the_original_and_is_decorated_once(make_module):
    module = make_module('shapes', SHAPE)
    cls = module.Shape
    assert (cls.__name__, cls.__qualname__, cls.__module__) == ('Shape', 'Shape', 'shapes')
    assert cls.__doc__ == 'A shape.'
    assert cls._orig_class_name == 'Shape' and cls._orig_module_src == textwrap.dedent(SHAPE)
    assert persistence.persistent_class(cls) is cls


def test_only_decorated_classes_and_their_instances_are_persistent(make_module):
    cls = make_module('shapes', SHAPE).Shape
    plain_subclass = type('Plain', (cls,), {})
    assert persistence.is_persistent(cls) and persistence.is_persistent(cls(3))
    assert not persistence.is_persistent(plain_subclass) and not persistence.is_persistent(plain_subclass(3))
    assert not persistence.is_persistent(3) and not persistence.is_persistent(int)


def test_the_outermost_of_two_decorated_classes_has_the_last_word(make_module):
    module = make_module('shapes', SHAPE + '''
    @persistence.persistent_class
    class Square(Shape):
        def __init__(self, name):
            super().__init__(4, name=name)
''')
    square = pickle.loads(pickle.dumps(module.Square('box')))
    assert type(square) is module.Square and square.init_args == ('box',) and square.init_kwargs == {}
    assert square.describe() == 'box has 4 sides'


def test_an_argument_that_does_not_pickle_is_an_error_at_once(make_module):
    cls = make_module('shapes', SHAPE).Shape
    with pytest.raises(TypeError, match=r'Shape: cannot be saved'):
        cls(3, options=lambda: None)


def test_a_class_without_a_source_file_is_refused(monkeypatch):
    cls = type('Orphan', (), {'__module__': 'nowhere'})
    monkeypatch.setitem(sys.modules, 'nowhere', type(sys)('nowhere'))
    with pytest.raises(ValueError, match='source code of module nowhere'):
        persistence.persistent_class(cls)


def test_the_pickled_form_is_the_published_one(make_module):
    shape = make_module('shapes', SHAPE).Shape(3)
    function, arguments, state = shape.__reduce_ex__(4)
    assert function is persistence._reconstruct_persistent_obj and state is None
    meta, = arguments
    assert list(meta) == ['type', 'version', 'module_src', 'class_name', 'state'] and type(meta) is dict
    assert (meta['type'], meta['version'], meta['class_name']) == ('class', 6, 'Shape')
    assert meta['state']['sides'] == 3 and meta['state']['_init_args'] == (3,)


def test_the_installed_class_is_used_where_the_text_is_the_same(make_module):
    module = make_module('shapes', SHAPE)
    assert type(pickle.loads(pickle.dumps(module.Shape(3)))) is module.Shape


def test_an_object_keeps_its_behaviour_and_its_source_when_the_class_changes(make_module):
    data = pickle.dumps(make_module('shapes', SHAPE).Shape(3, 'it'))
    forget('shapes')
    changed = make_module('shapes', SHAPE.replace('has', 'used to have').replace('x', 'y') + '\n')
    old = pickle.loads(data)
    assert old.describe() == 'it has 3 sides' and type(old) is not changed.Shape
    assert type(old).__module__.startswith('_imported_module_')
    again = pickle.dumps(old)
    forget(type(old).__module__)
    assert pickle.loads(again).describe() == 'it has 3 sides'


def test_hooks_may_mend_the_source_text(make_module):
    data = pickle.dumps(make_module('shapes', SHAPE).Shape(3, 'it'))
    forget('shapes')

    @persistence.import_hook
    def mend(meta):
        meta.module_src = meta.module_src.replace('has', 'had')
        return meta
    assert pickle.loads(data).describe() == 'it had 3 sides'


@pytest.mark.parametrize('change', [{'version': 7}, {'type': 'function'}])
def test_an_unknown_format_is_refused(change):
    meta = {'type': 'class', 'version': 6, 'module_src': '', 'class_name': 'X', 'state': {}}
    with pytest.raises(UserError, match='only classes of format 6'):
        persistence._reconstruct_persistent_obj({**meta, **change})


def test_a_text_that_fails_leaves_nothing_behind():
    before = set(sys.modules)
    meta = {'type': 'class', 'version': 6, 'module_src': 'raise OSError(7)', 'class_name': 'X', 'state': {}}
    for _ in range(2):
        with pytest.raises(OSError, match='7'):
            persistence._reconstruct_persistent_obj(meta)
    assert set(sys.modules) == before


PARTS = {'parts.base': 'UNIT = 3\n',
         'parts.tools': 'from parts import base\ndef double(x):\n    return 2 * base.UNIT * x\n',
         'parts.thing': '''
            import json
            from parts.tools import double
            from torch_utils import persistence
            @persistence.persistent_class
            class Thing:
                def use(self):
                    return double(7)
            '''}


def test_modules_of_the_same_package_travel_with_an_object(make_module, tmp_path):
    for name, text in PARTS.items():
        module = make_module(name, text)
    data = pickle.dumps(module.Thing())
    forget(*PARTS, 'parts')
    for path in (tmp_path / 'parts').glob('*.py'):
        path.unlink()
    thing = pickle.loads(data)
    assert thing.use() == 42
    assert not any(name.startswith('parts') for name in sys.modules)
    assert pickle.loads(pickle.dumps(thing)).use() == 42


def test_a_plain_subclass_pickles_like_any_class(make_module):
    module = make_module('shapes', SHAPE + '    class Plain(Shape):\n        pass\n')
    twin = pickle.loads(pickle.dumps(module.Plain(3)))
    assert type(twin) is module.Plain and twin.sides == 3


def small_generator():
    return networks.Generator(z_dim=4, c_dim=0, w_dim=4, img_resolution=8, img_channels=3,
                              synthesis_kwargs={'channel_base': 32, 'channel_max': 4})


def test_deepcopy_of_a_network_keeps_classes_and_executes_nothing(monkeypatch):
    G = small_generator()
    monkeypatch.setattr(persistence, '_module_of', None)
    twin = copy.deepcopy(G)
    assert [type(m) for m in twin.modules()] == [type(m) for m in G.modules()]
    z = torch.randn(2, 4)
    assert torch.equal(twin(z, None, noise_mode='const'), G(z, None, noise_mode='const'))
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in G.parameters()}


def test_deepcopy_keeps_shared_submodules_shared():
    layer = networks.FullyConnectedLayer(2, 2)
    twin = copy.deepcopy(torch.nn.ModuleList([layer, layer]))
    assert twin[0] is twin[1] and twin[0] is not layer


def test_constructing_a_network_does_not_pickle_its_weights(monkeypatch):
    written = []
    monkeypatch.setattr(persistence._Discard, 'write', lambda self, data: written.append(len(data)))
    small_generator()
    assert 0 < sum(written) < 10_000


def test_a_persistent_network_compiles_and_exports():
    mapping = small_generator().mapping.eval()
    z = torch.randn(2, 4)
    compiled = torch.compile(mapping, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(z, None), mapping(z, None))
    torch.testing.assert_close(torch.export.export(mapping, (z, None)).module()(z, None), mapping(z, None))


def test_a_snapshot_opens_where_there_are_only_torch_utils_and_dnnlib(tmp_path):
    G = small_generator()
    D = networks.Discriminator(c_dim=0, img_resolution=8, img_channels=3, channel_base=32, channel_max=4)
    pipe = augment.AugmentPipe(xflip=1, rotate=1, brightness=1)
    pickled.save_network_snapshot(tmp_path / 'net.pkl', G=G, D=D, G_ema=G, augment_pipe=pipe)
    out = open_elsewhere(tmp_path / 'net.pkl', tmp_path)
    with torch.no_grad():
        images = G.eval()(torch.zeros(2, 4), None, noise_mode='const')
    torch.testing.assert_close(out['images'], images)
    torch.testing.assert_close(out['logits'], D.eval()(images, None).detach())
