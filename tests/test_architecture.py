# SPDX-License-Identifier: Apache-2.0
"""Who may import whom, and how large a folder may become: docs/architecture.md as a test."""
import ast
import collections
import graphlib
import re
import subprocess
import sys

from source_tree import PACKAGES, ROOT, Source, product_files

# A module imports modules of its own level or below. Everything else is a script.
LEVELS = {name: level for level, names in enumerate([
    ['dnnlib', 'training.config'],
    ['torch_utils'],
    ['training.networks', 'training.augment', 'training.augmentation', 'training.dataset',
     'training.datasets', 'training.batches', 'training.loss', 'training.phases', 'training.systems'],
    ['training.formats', 'training.report'],
    ['training.run', 'training.sampling', 'training.transfer', 'training.state', 'stylegan2_ada'],
    ['training.accelerate', 'training.iteration', 'training.guards', 'training.capacity',
     'training.profiling', 'metrics'],
    ['training.training_loop', 'training.projection'],
]) for name in names}
SCRIPT_LEVEL = 7
MAX_ENTRIES = 24  # of training/: packages and modules
MAX_MODULES = 15  # of any package
MAX_MODULES_OF_GENERATE = 72  # while it generates; importing the script alone takes a dozen
LARGER = {'torch_utils/ops': 30}  # one operator per module
# Optional packages, and slow ones that --help should not load: what may be imported inside functions, and
# where.
LATE_IMPORTS = {
    'train': {'metrics', 'torch', 'torch_utils', 'training'}, 'stylegan2_ada': {'training'},
    'generate': {'training.sampling'}, 'style_mixing': {'training.sampling'},
    'legacy': {'training.formats', 'training.run'},
    'projector': {'training.projection'}, 'calc_metrics': {'metrics'}, 'profile_step': {'training.profiling'},
    'torch_utils.distributed': {'torch.distributed'},
    'training.formats.hub': {'huggingface_hub'},
    'training.datasets.lsun': {'lmdb'},
    'training.formats.load': {'torch_utils.pickles', 'training.formats', 'training.report'},
    'training.run.sinks': {'torch.utils', 'wandb'}, 'training.report.ticks': {'psutil'},
    'training.report.curves': {'matplotlib'},
    'dnnlib.download': {'requests'}, 'dnnlib.video': {'imageio_ffmpeg'},
}


def group(module):
    """The package or module at the first or, in training/, second place of a dotted name."""
    return '.'.join(module.split('.')[:2 if module.startswith('training.') else 1])


def level(module):
    return LEVELS.get(group(module), SCRIPT_LEVEL)


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


def test_every_module_has_a_level():
    groups = {group(s.module) for s in product_files()} - {'training'}
    assert {name for name in groups if '.' in name or name in PACKAGES} <= {*LEVELS}
    assert {*LEVELS} <= groups


def test_no_imports_run_in_circles():
    graph = collections.defaultdict(set)
    for s in product_files():
        own = group(s.module)
        graph[own] |= {group(name) for _, name in imports(s, top_level=True)
                       if name in own_modules() and group(name) not in ('training', own)}
    assert list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


def test_folders_stay_small_enough_to_read():
    modules = collections.Counter(s.path.parent.relative_to(ROOT).as_posix() for s in product_files()
                                  if s.path.name != '__init__.py')
    too_large = {name: n for name, n in modules.items() if n > LARGER.get(name, MAX_MODULES)}
    assert not too_large
    entries = {s.path.relative_to(ROOT / 'training').parts[0] for s in product_files()
               if s.module.split('.')[0] == 'training'}
    assert len(entries) <= MAX_ENTRIES, sorted(entries)


def test_all_paths_in_the_documentation_exist():
    docs = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md')]
    named = [(doc.name, path) for doc in docs for path in re.findall(
        r'`((?:benchmarks|dnnlib|docker|docs|metrics|scripts|tests|torch_utils|training)/[\w./-]*)`',
        doc.read_text(encoding='utf-8'))]
    assert len(named) > 100
    assert not [f'{doc}: {path}' for doc, path in named if not (ROOT / path).exists()]


def test_the_walks_through_the_files_are_short():
    text = (ROOT / 'docs' / 'architecture.md').read_text(encoding='utf-8')
    for title, most in (('One training iteration', 18), ('One call of generate.py', 20), ('One resume', 25)):
        section = text.split(f'## {title}')[1].split('\n## ')[0]
        assert 10 < len(re.findall(r'^\d+\. ', section, re.MULTILINE)) <= most, title


def test_nobody_imports_a_script():
    scripts = {s.module for s in product_files() if '.' not in s.module} - set(PACKAGES)
    wrong = [f'{s.at(node)}: imports the script {name}' for s in product_files()
             for top in (True, False) for node, name in imports(s, top) if name in scripts]
    assert scripts and not wrong, '\n'.join(wrong)


def test_generating_images_imports_few_modules():
    code = ('import sys, generate, training.sampling.generation\n'
            f'print(sum(name.split(".")[0] in {PACKAGES!r} for name in sys.modules))')
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(run.stdout) < MAX_MODULES_OF_GENERATE  # and generate itself


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


def test_levels_are_those_of_the_package_in_training_or_at_the_top():
    order = ['dnnlib.util', 'torch_utils.ops.fma', 'training.datasets.sources', 'training.formats.load',
             'training.state', 'metrics.metric_main', 'training.training_loop', 'train']
    assert [level(module) for module in order] == list(range(8))
    assert level('training.config.options') == 0 and level('training.dataset') == level('training.loss') == 2


def test_every_exception_to_the_rule_of_imports_is_in_use():
    used = {(s.module, late) for s in product_files() for _, name in imports(s, top_level=False)
            for late in LATE_IMPORTS.get(s.module, ()) if name == late or name.startswith(late + '.')}
    unused = {(module, late) for module, names in LATE_IMPORTS.items() for late in names} - used
    assert not unused, f'these late imports are gone: {sorted(unused)}'
