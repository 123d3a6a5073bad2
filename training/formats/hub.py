# SPDX-License-Identifier: Apache-2.0
"""Network files on the Hugging Face Hub: hf://user/repo[@revision][/file].

Tokens, cache, offline mode and endpoint are those of huggingface_hub: HF_TOKEN or `hf auth login`, HF_HOME,
HF_HUB_OFFLINE, HF_ENDPOINT.
"""
import contextlib
import os
import re
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import ModuleType

from dnnlib.util import UserError, first_line

PREFIX = 'hf://'
NAME = re.compile(r'hf://(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?'
                  r'(?:/(?P<file>[^/].*))?', re.ASCII)
NETWORK_FILE = 'model.safetensors'
SUFFIXES = ('.safetensors', '.pkl', '.pt')  # of files that load_network() opens


@dataclass(frozen=True)
class HubName:
    """The parts of hf://user/repo[@revision][/file]. revision: branch, tag or commit, None for main."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = '' if self.revision is None else f'@{urllib.parse.quote(self.revision)}'
        return f'{PREFIX}{self.repo}{revision}' + ('' if self.file is None else f'/{self.file}')


def is_hub_name(name: str) -> bool:
    """Whether a name is one of the Hub, right or wrong."""
    return name.startswith(PREFIX)


def parse_name(text: str) -> HubName:
    """The parts of a name. Raises UserError if it has others."""
    match = NAME.fullmatch(text)
    if match is None:
        raise UserError(f'{text}: write hf://user/repo, hf://user/repo@revision or hf://user/repo/net.pkl')
    revision = match['revision']
    # The Hub writes the slash of a branch name as %2F.
    return HubName(match['repo'], revision and urllib.parse.unquote(revision), match['file'])


def fetch(text: str) -> str:
    """Path of a file of the Hub in the local cache, downloaded if it is not there or has changed.

    Without a file in the name: model.safetensors, or else the only network file of the repository. Raises
    UserError if it cannot be had.
    """
    name, library = parse_name(text), _library(text)
    wanted = replace(name, file=name.file or NETWORK_FILE)
    with _problems_told(library, wanted):
        try:
            return _download(library, wanted)
        except library.errors.EntryNotFoundError as error:
            if name.file is not None or isinstance(error, library.errors.LocalEntryNotFoundError):
                raise
        return _download(library, replace(name, file=_only_network(library, name)))


def upload(folder: str | os.PathLike, text: str, *, private: bool = False) -> str:
    """Commit the files of a folder to hf://user/repo[@branch]; returns the URL of the repository.

    A missing repository is created; unless private, as its owner's settings say. Raises UserError, also if
    there is no token.
    """
    name, library = check_destination(text)
    api = library.HfApi()
    with _problems_told(library, name):
        url = api.create_repo(name.repo, private=private or None, exist_ok=True)
        api.upload_folder(repo_id=name.repo, folder_path=folder, revision=name.revision,
                          commit_message='Upload a network of stylegan2-ada-clean')
    return str(url)


def check_destination(text: str) -> tuple[HubName, ModuleType]:
    """(name, huggingface_hub) for an upload. Raises UserError if the name or the token is missing."""
    name, library = parse_name(text), _library(text)
    if name.file is not None:
        raise UserError(f'{text}: an upload has fixed file names; write hf://{name.repo}')
    if library.get_token() is None:
        raise UserError(f'{text}: an upload needs a token; run `hf auth login`, or set HF_TOKEN')
    return name, library


def _library(text: str) -> ModuleType:
    # Imported on use: an optional package, of the extra `hub`.
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise UserError(f"{text}: needs one more package: pip install huggingface_hub, or this project's "
                        'extra `hub`') from error
    return huggingface_hub


def _download(library: ModuleType, name: HubName) -> str:
    return library.hf_hub_download(name.repo, name.file, revision=name.revision)


def _only_network(library: ModuleType, name: HubName) -> str:
    files = library.HfApi().list_repo_files(name.repo, revision=name.revision)
    networks = sorted(file for file in files if file.endswith(SUFFIXES))
    if len(networks) != 1:
        found = f'several network files ({", ".join(networks)})' if networks else 'no network file'
        raise UserError(f'{name}: the repository has {found}; append the one to use, such as {name}/net.pkl')
    return networks[0]


@contextlib.contextmanager
def _problems_told(library: ModuleType, name: HubName) -> Iterator[None]:
    """Turn errors of the library and the network in the block into a UserError."""
    errors = library.errors
    try:
        yield
    except UserError:
        raise
    # RuntimeError: what an upload to the Hub's storage raises.
    except (errors.HTTPError, errors.EntryNotFoundError, OSError, ValueError, RuntimeError) as error:
        raise UserError(f'{name}: {_problem(errors, error, name)}') from error


def _problem(errors: ModuleType, error: Exception, name: HubName) -> str:
    """What went wrong and what to do. The order matters: some classes are derived from others."""
    at = f'{PREFIX}{name.repo}'
    access = 'check the name; a private one needs a token (`hf auth login`, or HF_TOKEN)'
    known = [
        (errors.GatedRepoError, f'{at} is gated: accept its conditions on its page, and log in with `hf auth '
                                'login` or HF_TOKEN'),
        (errors.RepositoryNotFoundError, f'no such repository, or no access to it; {access}'),
        (errors.RevisionNotFoundError, f'no revision {name.revision} in this repository; check the name'),
        (errors.LocalEntryNotFoundError, 'not in the cache, and the Hub is not available; check the '
                                         'connection, HF_ENDPOINT and HF_HUB_OFFLINE'),
        (errors.EntryNotFoundError, f'no file {name.file} in this repository; check the name'),
        (errors.OfflineModeIsEnabled, 'the Hub is needed, but offline mode is on; unset HF_HUB_OFFLINE'),
    ]
    for kind, text in known:
        if isinstance(error, kind):
            return text
    return f'{first_line(error)}; check name, token (HF_TOKEN) and connection'
