"""Protocols: what is asked. One file each with `load(settings) -> Protocol`; a new one is a file and a line here."""

from __future__ import annotations

from importlib import import_module

from infer.evaluate.cases import Case, Protocol
from infer.evaluate.protocols.crossing import seed_of
from infer.evaluate.protocols.photos import RESERVED
from infer.evaluate.protocols.prompts import with_article
from infer.evaluate.settings import ProtocolSettings

KINDS = {
    "toybox": "infer.evaluate.protocols.toybox",
    "dreambench": "infer.evaluate.protocols.dreambench",
    "openimages": "infer.evaluate.protocols.openimages",
    "folder": "infer.evaluate.protocols.folder",
}


def load_protocol(settings: ProtocolSettings) -> Protocol:
    """All that is asked for; equal settings and files give equal cases.

    Raises:
        UserError: a folder, list or name that is not there, or nothing is left to ask for.
    """
    protocol: Protocol = import_module(KINDS[settings.kind]).load(settings)
    return protocol


def class_cases(protocol: Protocol, images: int) -> tuple[Case, ...]:
    """Bare class words ("a dog"), spread evenly over the protocol's subjects: what methods do without any of them.

    A method that is tuned draws each with the subject that it was tuned to, whose word is left out.
    """
    subjects = list(dict.fromkeys(subject for case in protocol.cases for subject in case.subjects))
    cases = []
    for i, subject in enumerate(subjects):
        group, prompt = f"{RESERVED}--{subject.id}", with_article(subject.noun)
        for number in range(images // len(subjects) + (i < images % len(subjects))):
            case_id = f"{group}--{number}"
            seed = seed_of(case_id)
            cases.append(Case(case_id, group, "class", prompt, "new scene", seed, (), (), tuned_to=(subject,)))
    return tuple(cases)
