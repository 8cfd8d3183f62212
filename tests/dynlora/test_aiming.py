"""What the default objective wants of new names, against loops written from its description."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dynlora.aiming import Aim
from dynlora.errors import ModelError
from dynlora.moments import ImageMoments, MixedMoments

WIDTH = 6


def unit(count, seed):
    """(count, WIDTH) unit vectors."""
    return F.normalize(torch.randn(count, WIDTH, generator=torch.Generator().manual_seed(seed)), dim=-1)


def aim_of(general, **weights):
    """Five images of two classes, and three other names."""
    settings = {"guard": 3.0, "keep": 10.0, "margin": 2.0} | weights
    labels = torch.tensor([0, 0, 1, 1, 1])
    return Aim(unit(5, 1), labels, unit(2, 2), unit(3, 3), general, 20.0, **settings)


def test_the_loss_is_what_naive_loops_make_of_its_description():
    """In float64, image by image and draw by draw."""
    general = ImageMoments.of(unit(50, 4))
    aim, texts = aim_of(general), unit(2, 5)
    got = float(aim.loss(texts, torch.Generator().manual_seed(9)))
    drawn = general.draw(1024, torch.Generator().manual_seed(9)).double()
    new, old, others = texts.double(), aim.before.double(), aim.others.double()

    def log_sum(values):
        return math.log(sum(math.exp(v) for v in values))

    def dots(image, names):
        return [20.0 * float(image @ name) for name in names]

    stand_out = 0.0
    for image, label in zip(aim.images.double(), aim.labels.tolist(), strict=True):
        own = dots(image, new)
        stand_out += (log_sum([*own, *dots(image, others)]) - own[label]) / 5
    general_loss, mine = 0.0, 0
    for image in drawn:
        before, other, own = dots(image, old), dots(image, others), dots(image, new)
        if max(before) > max(other):
            mine += 1
            place = before.index(max(before))
            rivals = [*other, *(v for n, v in enumerate(own) if n != place)]
            general_loss += 10.0 * math.log1p(math.exp(log_sum(rivals) - own[place]))
        else:
            general_loss += 3.0 * math.log1p(math.exp(log_sum(own) - max(other) + 2.0))

    assert 0 < mine < 1024
    assert got == pytest.approx(stand_out + general_loss / 1024, rel=1e-4)


def test_of_very_many_images_a_step_looks_at_some_and_on_average_sees_them_all():
    """Memory is bounded; the mean over steps comes to the loss over all."""
    many = 20_000
    images, labels = unit(many, 1), torch.arange(many) % 2
    aim = Aim(images, labels, unit(2, 2), unit(3, 3), ImageMoments.of(unit(50, 4)), 20.0, 0.0, 0.0, 0.0)
    texts = unit(2, 5)
    logits = torch.cat(
        [20.0 * images @ texts.T, torch.logsumexp(20.0 * images @ unit(3, 3).T, 1)[:, None]], 1
    )
    losses = [float(aim.loss(texts, torch.Generator().manual_seed(step))) for step in range(20)]

    assert len(set(losses)) == 20
    assert sum(losses) / 20 == pytest.approx(float(F.cross_entropy(logits, labels)), rel=0.01)


def test_a_name_at_its_own_images_costs_less_than_one_at_other_names():
    """And one that lies where images in general lie costs most of all."""
    images = F.normalize(unit(1, 1) + 0.1 * unit(5, 8), dim=-1)
    everywhere = ImageMoments.of(F.normalize(unit(1, 7) + 0.3 * unit(60, 4), dim=-1))
    labels = torch.zeros(5, dtype=torch.int64)
    aim = Aim(images, labels, unit(1, 2), unit(3, 3), everywhere, 20.0, guard=3.0, keep=0.0, margin=2.0)
    losses = [
        float(aim.loss(text, torch.Generator().manual_seed(0)))
        for text in (unit(1, 1), unit(1, 3), unit(1, 7))
    ]

    assert losses[0] < losses[1] < losses[2]


@given(st.integers(2, 40), st.integers(0, 1000))
def test_draws_are_unit_vectors_that_follow_from_the_generator(count, seed):
    """Whatever the moments were made of, also of fewer images than dimensions."""
    moments = ImageMoments.of(unit(count, seed))
    one, other = (moments.draw(16, torch.Generator().manual_seed(seed)) for _ in range(2))

    assert torch.equal(one, other)
    assert torch.allclose(one.norm(dim=1), torch.ones(16), atol=1e-5)


def test_every_class_counts_the_same_in_the_moments_of_classes():
    """However many images it has: as if the smaller ones came as often."""
    embeddings, labels = unit(5, 0), torch.tensor([0, 0, 2, 2, 2])
    even = torch.cat([embeddings[:2]] * 3 + [embeddings[2:]] * 2)
    moments = ImageMoments.of_classes(embeddings, labels)

    assert torch.allclose(moments.mean, even.mean(0), atol=1e-6)
    assert torch.allclose(moments.covariance, torch.cov(even.T, correction=0), atol=1e-6)


def test_a_share_of_mixed_draws_is_of_the_second_kind():
    """Told apart by where they lie."""
    first, second = (ImageMoments(mean, 1e-6 * torch.eye(WIDTH)) for mean in torch.eye(WIDTH)[:2])
    drawn = MixedMoments(first, second, 0.75).draw(100, torch.Generator().manual_seed(0))

    assert drawn.argmax(1).tolist() == [0] * 25 + [1] * 75


def test_moments_survive_a_file_and_damaged_or_foreign_files_are_refused(tmp_path):
    """By name, with what was expected."""
    path = tmp_path / "image_moments.safetensors"
    moments = ImageMoments.of(unit(20, 0))
    path.write_bytes(moments.content())
    loaded = ImageMoments.load(path, width=WIDTH)

    assert torch.equal(loaded.mean, moments.mean)
    assert torch.equal(loaded.covariance, moments.covariance)
    with pytest.raises(ModelError, match=r"width 6; the model's embeddings have 512"):
        ImageMoments.load(path, width=512)
    path.write_bytes(ImageMoments(moments.mean, -moments.covariance).content())
    with pytest.raises(ModelError, match="a covariance that no images can have; copy the file"):
        ImageMoments.load(path, width=WIDTH)
    path.write_bytes(moments.content()[:100])
    with pytest.raises(ModelError, match="image_moments"):
        ImageMoments.load(path, width=WIDTH)
