# SPDX-License-Identifier: Apache-2.0
"""Folders of runs: numbers that nobody else has, even among runs that start together."""
import threading

from training.run import folder


def test_run_numbers_go_on_after_the_highest_folder_with_leading_digits(tmp_path):
    assert folder.next_run_number(tmp_path / 'absent') == 0
    for name in ('00000-a', '00007-b', 'x00011', '3'):
        (tmp_path / name).mkdir()
    (tmp_path / '00099-file').write_text('')
    assert folder.claim_run_dir(tmp_path, 'c').name == '00008-c'
    (tmp_path / '123456-many').mkdir()
    assert folder.claim_run_dir(tmp_path, 'c').name == '123457-c'


def test_runs_started_together_get_numbers_of_their_own(tmp_path):
    barrier, names = threading.Barrier(8), []

    def start(description):
        barrier.wait()
        names.append(folder.claim_run_dir(tmp_path / 'o', description).name)
    threads = [threading.Thread(target=start, args=(f'run{i}',)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(int(name[:5]) for name in names) == list(range(8))
    assert sorted(path.name for path in (tmp_path / 'o').iterdir()) == sorted(names)


def test_a_number_that_another_run_took_meanwhile_is_given_back(tmp_path, monkeypatch):
    (tmp_path / '00000-first').mkdir()
    numbers = iter([0, 1])
    monkeypatch.setattr(folder, 'next_run_number', lambda _: next(numbers))
    assert folder.claim_run_dir(tmp_path, 'second').name == '00001-second'
    assert sorted(path.name for path in tmp_path.iterdir()) == ['00000-first', '00001-second']


def test_the_folder_of_a_run_that_was_refused_goes_unless_it_holds_more(tmp_path):
    for name, files, is_kept in (
            ('0', {'.lock': '', 'log.txt': 'Error', 'training_options.json': '{}', 'stats.jsonl': ''}, False),
            ('1', {'log.txt': '', 'reals.png': ''}, True), ('2', {'stats.jsonl': '{"a": 1}'}, True)):
        (tmp_path / name).mkdir()
        for file, content in files.items():
            (tmp_path / name / file).write_text(content)
        folder.discard_unstarted(tmp_path / name)
        assert (tmp_path / name).exists() == is_kept
    folder.discard_unstarted(tmp_path / 'never there')
