# SPDX-License-Identifier: Apache-2.0
"""progress.html: what it shows of a run, that it needs nothing else, and that it stays small."""
import html.parser
import json
import re

import numpy as np
import PIL.Image
import pytest

from dnnlib.util import UserError
from training.report.page import eta_sec, log_warnings, progress_page, write_progress_page

OPTIONS = {
    'total_kimg': 100, 'batch_size': 32, 'batch_gpu': 16, 'num_gpus': 2, 'random_seed': 7, 'ema_kimg': 10,
    'training_set_kwargs': {'path': '/home/me/cats.zip', 'max_size': 500, 'resolution': 16, 'xflip': True,
                            'use_labels': False},
    'G_opt_kwargs': {'lr': 0.002}, 'D_opt_kwargs': {'lr': 0.001}, 'loss_kwargs': {'r1_gamma': 0.5},
    'ada_target': 0.6, 'augment_kwargs': {'class_name': 'x', 'xflip': 1, 'noise': 0},
}


def tick(kimg, **means):
    means = {'Progress/kimg': kimg, 'Timing/total_sec': kimg * 10, 'Timing/sec_per_kimg': 9.0,
             'Progress/augment': 0.25, 'Loss/G/loss': 1.0} | means
    return {name: {'num': 1, 'mean': mean, 'std': 0.0} for name, mean in means.items()}


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / '00007-cats'
    folder.mkdir()
    write_rows(folder / 'stats.jsonl', [tick(k) for k in (0, 10, 20)])
    (folder / 'training_options.json').write_text(json.dumps(OPTIONS))
    return folder


def write_rows(path, rows):
    path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def save_sheet(path, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, [64, 64, 3], dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(path)


def cards(page):
    """Label -> value of the boxes at the top."""
    found = re.findall(r'<div class="card"><b>(.*?)</b><span>(.*?)</span>', page)
    return {label: value for value, label in found}


class Elements(html.parser.HTMLParser):
    """Collects start tags with attributes, and checks that tags close in order."""

    EMPTY = ('meta', 'img')

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_moment_is_told_in_numbers(run_dir):
    page = progress_page(run_dir)
    assert cards(page) == {'of 100 kimg': '20', 'elapsed': '3m 20s', 'remaining (estimate)': '13m 20s',
                           'sec/kimg': '9', 'augment p': '0.250'}
    assert 'style="width: 20.00%"' in page and '<h1>00007-cats</h1>' in page


def test_a_finished_run_says_so(run_dir):
    write_rows(run_dir / 'stats.jsonl', [tick(0), tick(100.01)])
    assert cards(progress_page(run_dir))['state'] == 'finished'


def test_options_are_those_one_compares_and_name_no_folder(run_dir):
    page = progress_page(run_dir)
    facts = dict(re.findall(r'<dt>(.*?)</dt><dd>(.*?)</dd>', page))
    assert facts == {
        'Data': 'cats.zip', 'Images': '500', 'Resolution': '16x16', 'Mirrored': 'yes', 'Labels': 'no',
        'Batch': '32, 16 per pass on 2 devices', 'Learning rate': '0.002 (G), 0.001 (D)', 'R1 gamma': '0.5',
        'Augmentation': 'adaptive, target 0.6', 'Transforms': 'xflip', 'EMA half-life': '10 kimg',
        'Seed': '7'}
    assert '/home/me' not in page and str(run_dir.parent) not in page


@pytest.mark.parametrize('options, text', [
    ({'augment_p': 0.2}, 'fixed, p = 0.2'), ({}, 'none'),
    ({'ada_target': 0.5, 'augment_p': 0.1}, 'adaptive')])
def test_the_augmentation_is_named(run_dir, options, text):
    (run_dir / 'training_options.json').write_text(json.dumps(options))
    assert f'<dd>{text}' in progress_page(run_dir)


def test_metrics_have_a_card_and_a_curve(run_dir):
    write_rows(run_dir / 'metric-fid50k_full.jsonl', [
        {'results': {'fid50k_full': value}, 'snapshot_pkl': f'network-snapshot-{kimg:06d}.pkl'}
        for kimg, value in ((0, 90.0), (10, 20.0), (20, 30.0))])
    write_rows(run_dir / 'metric-is50k.jsonl', [{'results': {'is50k_mean': 3.0}, 'timestamp': 1}])
    write_rows(run_dir / 'metric-odd.jsonl', [{'results': {}}, {'results': {'odd': None}}, {'results': 1}])
    page = progress_page(run_dir)
    assert cards(page)['best fid50k_full, now 30'] == '20' and cards(page)['is50k_mean'] == '3'
    assert '<h3>Image quality: fid50k_full</h3>' in page


def test_images_stand_side_by_side_and_over_time(run_dir):
    for i, name in enumerate(('fakes_init', 'fakes000010', 'fakes000020', 'reals')):
        save_sheet(run_dir / f'{name}.png', i)
    page = progress_page(run_dir)
    captions = re.findall(r'<figcaption><(?:h3|span)>(.*?)</(?:h3|span)></figcaption><img', page)
    assert captions == ['Generated at 20 kimg', 'Training images', 'at the start', '10 kimg', '20 kimg']


def test_a_stopped_run_shows_the_kimg_of_its_last_samples(run_dir):
    save_sheet(run_dir / 'fakes000020-528.png')
    assert cards(progress_page(run_dir, 'stopped (SIGTERM)'))['of 100 kimg'] == '20.53'
    assert cards(progress_page(run_dir))['of 100 kimg'] == '20'


def test_broken_and_missing_images_are_skipped(run_dir):
    (run_dir / 'fakes000010.png').write_bytes(b'no image')
    save_sheet(run_dir / 'reals.png')
    page = progress_page(run_dir)
    assert 'Training images' in page and 'Generated at' not in page and 'over time' not in page


def test_warnings_of_the_log_are_shown_once_each_and_escaped(run_dir):
    (run_dir / 'log.txt').write_text(
        'tick 0\nWarning: <b>p</b> is high\nTraining goes on\nWarning: <b>p</b> is high\n'
        'Note: small\nD has won. Remedies: more images\n', encoding='utf-8')
    assert log_warnings(run_dir / 'log.txt') == [
        '<b>p</b> is high', 'Note: small', 'D has won. Remedies: more images']
    page = progress_page(run_dir)
    assert '<li>&lt;b&gt;p&lt;/b&gt; is high</li>' in page and '<b>p</b>' not in page


def test_many_and_long_warnings_are_cut(run_dir):
    (run_dir / 'log.txt').write_text(''.join(f'Warning: {i} {"x" * 9000}\n' for i in range(100)))
    lines = log_warnings(run_dir / 'log.txt')
    assert len(lines) == 20 and lines[-1].startswith('99 ') and max(map(len, lines)) == 500
    assert log_warnings(run_dir / 'missing.txt') == []


def test_the_page_is_well_formed_and_loads_nothing(run_dir):
    save_sheet(run_dir / 'fakes_init.png')
    save_sheet(run_dir / 'fakes000010.png')
    page = progress_page(run_dir)
    tags = Elements(page).tags
    links = [value for _, attrs in tags for name, value in attrs.items() if name in ('src', 'href', 'action')]
    assert links and all(value.startswith('data:image/') for value in links)
    assert not {tag for tag, _ in tags} & {'link', 'iframe', 'object', 'base'}
    assert 'url(' not in page and '@import' not in page and '://' not in page
    assert any("default-src 'none'" in (attrs.get('content') or '') for _, attrs in tags)


def test_names_in_files_cannot_put_markup_into_the_page(tmp_path):
    folder = tmp_path / '<script>alert(1)<'
    folder.mkdir()
    write_rows(folder / 'stats.jsonl', [tick(1)])
    evil = '<img src=x onerror=alert(1)>'
    write_rows(folder / 'metric-a.jsonl', [{'results': {evil: 1.0}, 'snapshot_pkl': 'a-1.pkl'}])
    (folder / 'training_options.json').write_text(json.dumps(
        {'batch_size': evil, 'num_gpus': evil, 'resume_pkl': evil, 'loss_kwargs': {'r1_gamma': evil},
         'training_set_kwargs': {'path': evil, 'resolution': evil}, 'augment_kwargs': {evil: 1}}))
    page = progress_page(folder)
    assert '<script>alert' not in page and '<img src=x' not in page
    Elements(page)


@pytest.mark.parametrize('text', [
    None, '{"broken', '[1, 2]', '{"total_kimg": "x", "training_set_kwargs": 3}'])
def test_without_readable_options_the_rest_is_shown(run_dir, text):
    (run_dir / 'training_options.json').unlink()
    if text is not None:
        (run_dir / 'training_options.json').write_text(text)
    page = progress_page(run_dir)
    assert cards(page)['kimg shown'] == '20' and '<h3>Losses</h3>' in page and 'class="bar"' not in page


@pytest.mark.parametrize('rows, expected', [
    ([tick(0), tick(10)], 900.0), ([tick(10)], None), ([], None),
    ([tick(0, **{'Timing/total_sec': 500.0}), tick(10)], None),  # the clock began anew
    ([tick(0), tick(10, **{'Timing/total_sec': None})], None), ([tick(0), tick(200)], 0.0)])
def test_the_remaining_time_follows_from_recent_ticks(rows, expected):
    assert eta_sec(rows, 100) == expected


def test_a_long_run_with_noisy_sheets_stays_below_two_megabytes(run_dir):
    values = np.random.default_rng(0).normal(size=4000)
    write_rows(run_dir / 'stats.jsonl', [
        tick(i, **{f'Loss/{name}': value for name in ('D/loss', 'signs/real', 'signs/fake', 'scores/real')})
        for i, value in enumerate(values)])
    pixels = np.random.default_rng(0).integers(0, 256, [1100, 1100, 3], dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(run_dir / 'reals.png', compress_level=0)
    for name in ('fakes_init', *(f'fakes{i:06d}' for i in range(20))):
        (run_dir / f'{name}.png').hardlink_to(run_dir / 'reals.png')
    (run_dir / 'training_options.json').write_text(json.dumps({'training_set_kwargs': {'resolution': 128}}))
    path = write_progress_page(run_dir)
    assert path == run_dir / 'progress.html' and 500_000 < path.stat().st_size < 2_000_000


def test_without_a_tick_there_is_no_page_and_the_old_one_stays(run_dir):
    write_progress_page(run_dir)
    before = (run_dir / 'progress.html').read_text()
    (run_dir / 'stats.jsonl').write_text('')
    with pytest.raises(UserError, match=r'stats\.jsonl: contains no tick'):
        write_progress_page(run_dir)
    assert (run_dir / 'progress.html').read_text() == before
    assert not list(run_dir.glob('.*'))
