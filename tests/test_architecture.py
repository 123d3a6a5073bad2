# SPDX-License-Identifier: Apache-2.0
"""Who may import whom: docs/architecture.md as a test."""
import ast
import sys

from source_tree import PACKAGES, ROOT, Source, product_files

# The first matching prefix decides. A module imports modules of its own level or below.
LEVELS = [
    ('dnnlib', 0), ('training.config', 0),
    ('torch_utils', 1),
    ('training.networks', 2), ('training.augment', 2), ('training.augmentation', 2), ('training.dataset', 2),
    ('training.datasets', 2), ('training.batches', 2),
    ('training.training_loop', 4),
    ('training', 3), ('metrics', 3), ('legacy', 3),
]
SCRIPT_LEVEL = 5
# Not everyone has these, or --help should not wait for them: what may be imported inside functions, and
# where.
LATE_IMPORTS = {
    'train': {'torch', 'torch_utils', 'training'},
    'torch_utils.distributed': {'torch.distributed'},
    'training.datasets.sources': {'lmdb'},
    'training.run.sinks': {'torch.utils', 'wandb'}, 'training.report.ticks': {'psutil'},
    'training.report.curves': {'matplotlib'},
    'dnnlib.download': {'requests'}, 'dnnlib.video': {'imageio_ffmpeg'},
}
# Networks travel inside pickles as source, which must run with torch_utils and dnnlib alone.
PICKLED = {'training.networks', 'training.systems.stylegan1', 'training.systems.dcgan', 'training.augment',
           'training.augmentation', 'training.augmentation.numbers', 'training.augmentation.resample',
           'training.augmentation.matrices'}


def level(module):
    for prefix, number in LEVELS:
        if module == prefix or module.startswith((prefix + '.', prefix + '_')):
            return number
    return SCRIPT_LEVEL


def imports(source, top_level):
    """(node, module) of the imports outside functions, or of those inside."""
    inside = {id(n) for f in source.functions() for n in ast.walk(f)}
    for node in ast.walk(source.tree):
        if (id(node) in inside) == top_level:
            continue
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f'{source.at(node)}: relative import'
            yield node, node.module
            if node.module in PACKAGES or node.module == 'torch_utils.ops':
                yield from ((node, f'{node.module}.{alias.name}') for alias in node.names)


def own_modules():
    return {s.module for s in product_files()}


def test_no_module_imports_one_above_its_level():
    own = own_modules()
    wrong = [f'{s.at(node)}: {s.module} (level {level(s.module)}) imports {name} (level {level(name)})'
             for s in product_files() for node, name in imports(s, top_level=True)
             if name in own and name not in PACKAGES and level(name) > level(s.module)]
    assert not wrong, '\n'.join(wrong)


def test_nobody_imports_a_script():
    scripts = {s.module for s in product_files() if '.' not in s.module} - set(PACKAGES) - {'legacy'}
    wrong = [f'{s.at(node)}: imports the script {name}' for s in product_files()
             for top in (True, False) for node, name in imports(s, top) if name in scripts]
    assert scripts and not wrong, '\n'.join(wrong)


def test_imports_inside_functions_are_only_the_listed_ones():
    wrong = [f'{s.at(node)}: imports {name} inside a function' for s in product_files()
             for node, name in imports(s, top_level=False)
             if not any(name == late or name.startswith(late + '.') for late in LATE_IMPORTS.get(s.module,
             ()))]
    assert not wrong, '\n'.join(wrong)


def test_configuration_needs_only_the_standard_library():
    allowed = set(sys.stdlib_module_names) | {'dnnlib', 'training'}
    wrong = [
        f'{s.at(node)}: imports {name}' for s in product_files() if s.module.startswith('training.config')
             for node, name in imports(s, top_level=True) if name.split('.')[0] not in allowed]
    assert not wrong, '\n'.join(wrong)


def test_networks_need_only_what_a_pickle_reader_has():
    wrong = [f'{s.at(node)}: imports {name}' for s in product_files() if s.module in PICKLED
             for node, name in imports(s, top_level=True)
             if name.split('.')[0] in ('metrics', 'training') and name not in {*PICKLED, 'training'}]
    assert not wrong, '\n'.join(wrong)


def test_only_the_registry_touches_torch_library():
    wrong = [s.module for s in product_files() if 'torch.library' in s.text.replace('`torch.library', '')
             and any(isinstance(n,
             ast.Attribute) and ast.unparse(n).startswith('torch.library') for n in ast.walk(s.tree))]
    assert wrong == ['torch_utils.ops._registry']


# The rules themselves, on a file that breaks them.
def broken():
    text = 'import torch\nfrom training import networks\n\ndef f():\n    import lmdb\n'
    return Source(ROOT / 'dnnlib' / 'bad.py', 'dnnlib.bad', text, ast.parse(text))


def test_imports_are_found_inside_and_outside_functions():
    names = [[name for _, name in imports(broken(), top)] for top in (True, False)]
    assert names == [['torch', 'training', 'training.networks'], ['lmdb']]


def test_levels_follow_the_longest_fitting_name():
    order = ['dnnlib.util', 'torch_utils.ops.fma', 'training.datasets.sources', 'training.loss',
             'training.training_loop', 'train']
    assert [level(module) for module in order] == [0, 1, 2, 3, 4, 5]
    assert level('training.config.options') == 0 and level('metrics.metric_main') == level('legacy') == 3


def test_every_exception_to_the_rule_of_imports_is_in_use():
    used = {(s.module, late) for s in product_files() for _, name in imports(s, top_level=False)
            for late in LATE_IMPORTS.get(s.module, ()) if name == late or name.startswith(late + '.')}
    unused = {(module, late) for module, names in LATE_IMPORTS.items() for late in names} - used
    assert not unused, f'these late imports are gone: {sorted(unused)}'
