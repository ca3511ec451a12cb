"""Mistakes that implementations of these metrics have had, or might have, and the test that sees each of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest

from selfguide.data.autoencoders import autoencoder, images
from selfguide.data.normaliser import Normaliser
from selfguide.discovery import agreement as of_groups
from selfguide.evaluation import beside, job, paired, scores
from selfguide.evaluation.features import effnet, inception, net, resize
from selfguide.evaluation.metrics import (
    cluster_frechet,
    copies,
    density_coverage,
    fdr,
    frechet,
    inception_score,
    kid,
    nearest,
    neighbours,
    ood,
    precision_recall,
    probe,
)
from selfguide.evaluation.metrics import moments as of_moments
from selfguide.evaluation.metrics.frechet import Reference
from selfguide.evaluation.metrics.moments import Moments
from selfguide.spec.weight_files import EFFNET, locate
from tests.selfguide import test_agreement as agreements
from tests.selfguide import test_autoencoders as levels
from tests.selfguide import test_feature_metrics as features
from tests.selfguide import test_feature_nets as nets
from tests.selfguide import test_frechet as frechets
from tests.selfguide import test_label_probes as probes
from tests.selfguide import test_moments as sums
from tests.selfguide import test_paired as pairings
from tests.selfguide import test_protocol_extras as extras
from tests.selfguide import test_score_oracles as whole_sets

Check = Callable[[pytest.FixtureRequest], None]


@dataclass(frozen=True)
class Mutation:
    """Texts of a function that become others, and the check that must see it."""

    name: str
    # what `tests.selfguide.mutation.planted` takes
    function: Callable[..., Any]
    edits: Mapping[str, str]
    check: Check


def rows(function: Callable[..., Any], check: Check, *each: tuple[str, ...]) -> Iterator[Mutation]:
    """Mutations of a function that one check sees, each as its name, a text, what it becomes, and so on."""
    for name, *texts in each:
        yield Mutation(name, function, dict(zip(texts[::2], texts[1::2], strict=True)), check)


@functools.cache
def by(test: Callable[..., None], *arguments: Any, fixtures: tuple[str, ...] = ()) -> Check:
    """A test of the suite, with its arguments in their order and with fixtures by their names."""
    # of a law one example will do, and Hypothesis would look for the smallest
    called = test.hypothesis.inner_test if hasattr(test, "hypothesis") else test

    def check(request: pytest.FixtureRequest) -> None:
        called(*arguments, **{name: request.getfixturevalue(name) for name in fixtures})

    return check


# ---- checks ----------------------------------------------------------------------------------------

three_packages = by(frechets.test_distance_equals_three_packages_on_the_same_statistics, 400, 1e-9)
closed_forms = by(frechets.test_distance_of_simple_gaussians_is_its_closed_form)
textbook = by(frechets.test_the_jackknife_is_the_textbook_formula)
few = by(frechets.test_distance_of_few_features_equals_that_of_their_moments, 5, 9)
weighs = by(
    frechets.test_cluster_frechet_leaves_out_clusters_that_have_too_few_and_weighs_the_others
)
ratio = by(frechets.test_fdr_is_the_mean_ratio_and_refuses_other_nets)
fresh = by(frechets.test_copies_are_found_and_fresh_images_are_not)

streams = by(
    sums.test_moments_of_any_batches_ranks_and_order_are_those_of_the_whole,
    (1000, 4100),
    (2, 0, 1),
    1e4,
)
digits_kept = by(sums.test_moments_in_float32_features_keep_the_digits_that_float32_sums_lose)
blocks_alike = by(sums.test_blocks_of_images_hold_every_label_alike_whatever_its_order, 10)

pairs = by(pairings.test_difference_of_two_records_is_the_paired_jackknife_of_their_images)
mixture = by(pairings.test_the_multiplier_is_that_of_the_mixture_and_narrowest_in_the_middle, 0.05)
over_sets = by(extras.test_standard_error_over_sets_is_that_of_their_mean)

fidelity_score = by(features.test_inception_score_of_shared_logits_equals_torch_fidelity, 1203, 10)
torchmetrics_score = by(features.test_inception_score_with_ddof_1_is_that_of_torchmetrics)
label_sorted = by(features.test_inception_score_of_images_in_order_of_labels_is_shuffled_first)
fidelity_kid = by(features.test_kid_of_shared_features_equals_torch_fidelity)
unbiased = by(features.test_kid_of_equal_distributions_has_mean_0_at_every_size, 20)
fidelity_shares = by(
    features.test_precision_and_recall_of_shared_features_equal_torch_fidelity, 3, 64
)
whole_matrices = by(features.test_every_chunk_gives_what_whole_matrices_give, 0, 2, 7, False)
strict_matrices = by(features.test_every_chunk_gives_what_whole_matrices_give, 0, 2, 7, True)
sizes = by(features.test_features_beyond_the_sizes_are_left_out)
originals = by(features.test_nearest_reference_finds_copies_and_names_their_originals, 13)
ood_oracle = by(features.test_ood_auroc_equals_that_of_scikit_learn, 0, 5)
ties = by(features.test_ood_auroc_counts_ties_half)

vote = by(probes.test_nearest_neighbours_of_digits_vote_as_scikit_learns, 7)
linear = by(probes.test_linear_accuracy_of_digits_is_near_scikit_learns)
adam = by(probes.test_the_first_step_of_a_linear_probe_is_adams_and_the_last_is_small)
best = by(probes.test_the_best_cell_is_chosen_on_the_validation_part)
nmi = by(agreements.test_nmi_is_by_definition_and_names_say_nothing)
by_chance = by(agreements.test_many_groups_drawn_at_random_agree_by_nmi_only)

nearer = by(levels.test_output_between_two_levels_becomes_the_nearer, 16)
decoder = by(levels.test_levels_of_a_decoder_are_the_nearest)


def at_size(size: int) -> Check:
    test = nets.test_fid_adm_with_torch_fidelitys_weights_is_its_features_bit_for_bit
    return by(functools.partial(test, size=size), fixtures=("ours", "fidelity"))


fidelity_features, fidelity_large = at_size(64), at_size(512)
spatial = by(
    nets.test_fid_adm_spatial_features_are_the_first_channels_of_mixed_6_by_row_and_column,
    fixtures=("ours", "fidelity"),
)
clean_resize, clean_enlarged = (
    by(nets.test_bicubic_antialiased_of_any_size_is_clean_fids_to_a_hundredth_of_a_level, size)
    for size in (512, 64)
)
clean_features = by(
    nets.test_fid_clean_is_clean_fids_resize_before_its_inception,
    fixtures=("inception", "monkeypatch"),
)
timm_features = by(
    nets.test_fd_timm_features_are_what_timm_makes_of_clean_fids_resize, fixtures=("tmp_path",)
)


def inception_anew(request: pytest.FixtureRequest) -> None:
    """torch-fidelity's features, and those of a net that is loaded now."""
    nets.test_fid_adm_with_torch_fidelitys_weights_is_its_features_bit_for_bit(
        net.load_feature_net("fid_adm", request.getfixturevalue("inception")),
        request.getfixturevalue("fidelity"),
        64,
    )


def effnet_oracle(_: pytest.FixtureRequest) -> None:
    """timm's features, where there are weights."""
    if locate(EFFNET) is None:
        pytest.skip("the extra `features` is not installed")
    nets.test_fd_effnet_from_the_package_sees_what_timm_sees()


adm = by(
    whole_sets.test_scores_of_adms_protocol_equal_torch_fidelitys_on_features_by_hand,
    fixtures=("tmp_path",),
)
of_digits = by(whole_sets.test_scores_of_digits_equal_clean_fids_on_the_same_features)

# ---- mutations -------------------------------------------------------------------------------------

# a row is a line
# fmt: off

MOMENTS = (
    *rows(Moments.gaussian, three_packages,
        ("covariance is biased", "/ (count - 1)", "/ count")),
    *rows(Moments.gaussian, streams,
        ("covariance in streams is biased", "/ (count - 1)", "/ count"),
        ("mean forgets the shift", "self.shift + offset", "offset"),
        ("covariance is about the shift", "outer - count * np.outer(offset, offset)", "outer"),
        ("mean's product is counted once", "count * np.outer", "np.outer")),
    *rows(Moments.__init__, digits_kept,
        ("sums are float32", "width + width**2))", "width + width**2), np.float32)")),
    *rows(Moments._add, digits_kept,
        ("products are float32", "part.T @ part", "part.T.astype(np.float32) @ part.astype(np.float32)")),
    *rows(of_moments.as_matrix, three_packages,
        ("features become float32", "np.float64", "np.float32")),
    *rows(Moments._about_shift, streams,
        ("features keep their shift", "wide - self.shift", "wide")),
    *rows(Moments.merge, streams,
        ("merge forgets its own", "self.sums[:] +=", "self.sums[:] =")),
    *rows(Moments._settle, streams,
        ("batches are added twice", "self._waiting = []", "pass")),
    *rows(Moments._block_of, blocks_alike,
        ("blocks follow the image's number", "images + (turns * blocks).astype(np.int64)", "images")),
)

FRECHET = (
    *rows(Reference.distance, three_packages,
        ("cross term is single", "- 2 * cross", "- cross"),
        ("shift is forgotten", "shift @ shift + ", ""),
        ("wrong triangle is read", '"L"', '"U"')),
    *rows(Reference.distance, closed_forms,
        ("shift is not squared", "shift @ shift", "np.sqrt(shift @ shift)"),
        ("shift is averaged over features", "shift @ shift", "(shift**2).mean()"),
        ("trace of one side is taken twice", "np.trace(covariance)", "np.trace(self.covariance)"),
        ("eigenvalues have no root", "np.sqrt(np.linalg.eigvalsh(", "(np.linalg.eigvalsh(")),
    *rows(frechet.square_root, closed_forms,
        ("square root is the covariance", "np.sqrt(values.clip(min=0))", "values")),
    *rows(frechet.jackknifed, textbook,
        ("jackknife divides as a variance", "(blocks - 1) / blocks *", "1 / (blocks - 1) *"),
        ("jackknife has no factor n - 1", "(blocks - 1) / blocks *", "1 / blocks *"),
        ("jackknife has the factor n", "(blocks - 1) / blocks *", ""),
        ("correction takes n blocks away", "- (blocks - 1) * left_out.mean()", "- blocks * left_out.mean()"),
        ("correction has the other sign", "blocks * full - (blocks - 1) *", "(2 - blocks) * full + (blocks - 1) *")),
    *rows(Moments.gaussian, textbook,
        ("jackknife leaves nothing out", "sums -= self.sums[without]", "pass")),
    *rows(cluster_frechet.between_few, few,
        ("few features are biased", "np.sqrt(len(each) - 1)", "np.sqrt(len(each))"),
        ("few features are not centred", "(each - each.mean(0))", "each")),
    *rows(cluster_frechet.cluster_frechet, weighs,
        ("clusters weigh alike", ", weights=sizes", "")),
    *rows(fdr.fdr, ratio,
        ("ratio is that of the means",
         "np.mean([distances[net] / validation[net] for net in sorted(distances)])",
         "sum(distances.values()) / sum(validation.values())")),
    *rows(copies.copy_rate, fresh,
        ("an image is its own neighbour in pixels", "but_itself=True", "but_itself=False")),
    *rows(paired.paired_difference, pairs,
        ("pairs are left out of one side only", "*b.gaussian(block)", "*b.gaussian()"),
        ("difference has the other sign",
         "reference.distance(*a", "-reference.distance(*a", "- reference", "+ reference")),
    *rows(paired.multiplier, mixture,
        ("looks are of fixed size", "float(-stdtrit(freedom, ndtr(-normal)))", "1.96")),
    *rows(beside.over_sets, over_sets,
        ("error over sets is their mean error", "np.sqrt((values**2).sum())", "values.sum()"),
        ("deviation over sets has ddof 0", "ddof=1", "ddof=0")),
)

SCORES = (
    *rows(inception_score.inception_score, label_sorted,
        ("label-sorted images are not shuffled", "if seed is not None:", "if False:"),
        ("images are not shuffled unless asked to", "seed: int | None = 2020", "seed: int | None = None")),
    *rows(inception_score.inception_score, fidelity_score,
        ("deviation of splits has ddof 1", "ddof: int = 0", "ddof: int = 1"),
        ("splits drop the remainder", "(i + 1) * count // splits)", "i * count // splits + count // splits)"),
        ("mean is over all splits", "p[part].mean(0)", "p.mean(0)"),
        ("mean is of the exponentials", "divergence.mean().exp()", "divergence.exp().mean()"),
        ("softmax is over images", "log_softmax(1)", "log_softmax(0)")),
    *rows(inception_score.inception_score, torchmetrics_score,
        ("ddof is not passed on", "np.std(scores, ddof=ddof)", "np.std(scores)")),
    *rows(kid._mmd, fidelity_kid,
        ("kid is the biased estimator",
         "kernel.sum() - np.trace(kernel)", "kernel.sum()", "(count * (count - 1))", "count**2")),
    *rows(kid._mmd, unbiased,
        ("kid counts pairs of an image with itself", "kernel.sum() - np.trace(kernel)", "kernel.sum()")),
    *rows(kid._cubic, fidelity_kid,
        ("kid's kernel is quadratic", "** 3", "** 2"),
        ("kid's kernel is not over D", "/ x.shape[1]", ""),
        ("kid's kernel has no constant", " + 1)", ")")),
    *rows(kid.kid, fidelity_kid,
        ("kid's subsets are drawn with replacement", "len(made), size, replace=False", "len(made), size, replace=True"),
        ("kid's deviation has ddof 1", "np.std(found)", "np.std(found, ddof=1)"),
        ("kid is seeded otherwise", "seed: int = 2020", "seed: int = 0")),
)

NEIGHBOURS = (
    *rows(neighbours.radii, fidelity_shares,
        ("an image is its own neighbour", "k + 1,", "k,", "[:, k]", "[:, k - 1]"),
        ("radius is one neighbour too far", "k + 1,", "k + 2,", "[:, k]", "[:, k + 1]")),
    *rows(neighbours.radii, whole_matrices,
        ("an image is its own neighbour in density", "k + 1,", "k,", "[:, k]", "[:, k - 1]")),
    *rows(neighbours.smallest, fidelity_shares,
        ("last tile decides", "torch.cat((found[rows], distances), 1)", "distances")),
    *rows(neighbours.tiles, fidelity_shares,
        ("distances are sums of differences", "b[j : j + chunk])", "b[j : j + chunk], p=1)")),
    *rows(precision_recall.precision_recall, fidelity_shares,
        ("precision and recall are swapped", "(share[0], share[1],", "(share[1], share[0],"),
        ("balls are those of the other set", "for each in (real, made)", "for each in (real, real[: len(made)])")),
    *rows(precision_recall.precision_recall, whole_matrices,
        ("a ball has no surface", "torch.lt if strict else torch.le", "torch.lt")),
    *rows(precision_recall.precision_recall, strict_matrices,
        ("a strict ball has a surface", "torch.lt if strict else torch.le", "torch.le")),
    *rows(precision_recall.drawn, sizes,
        ("all are taken, whatever the sizes", "[:most]", "")),
    *rows(density_coverage.density_coverage, whole_matrices,
        ("density is not over k", "(k * len(made))", "len(made)"),
        ("density is over real images", "(k * len(made))", "(k * len(real))"),
        ("density counts the surface", "distances < radius", "distances <= radius"),
        ("coverage needs two samples", "(held > 0)", "(held > 1)")),
    *rows(nearest.nearest_reference, originals,
        ("nearest image is numbered within its tile", "found.indices + columns.start", "found.indices"),
        ("copies are measured by second neighbours", "radii(real, 1,", "radii(real, 2,"),
        ("copies are counted by the upper quantile", ".quantile(quantile)", ".quantile(1 - quantile)")),
    *rows(ood.ood_auroc, ood_oracle,
        ("auroc is turned round", "(made, test)\n", "(test, made)\n")),
    *rows(ood.ood_auroc, ties,
        ("ties count as nearer", 'side="left"', 'side="right"')),
    *rows(ood.top_cosine, ood_oracle,
        ("training features have any length", "train = normalize(train)", "pass"),
        ("farthest image decides", ".amax(1)", ".amin(1)")),
)

LABELS = (
    *rows(probe.NearestNeighbours.predictions, vote,
        ("votes have no weights",
         "(self.cosines.double() / TEMPERATURE).exp()", "torch.ones_like(self.cosines).double()")),
    *rows(probe.NearestNeighbours.see, vote,
        ("votes are by products", "normalize(features.float())", "features.float()"),
        ("farthest images vote", "descending=True", "descending=False")),
    *rows(probe.Accuracy.of, linear,
        ("error of an accuracy has no root", "math.sqrt(share", "(share")),
    *rows(probe.LinearProbes.step, adam,
        ("learning rate stays", "self.lr * (1 + math.cos(math.pi * self.done / self.steps)) / 2", "self.lr")),
    *rows(probe.best_of, best,
        ("layer is chosen on the test part", "_validation", "_accuracy")),
    *rows(of_groups.agreement, nmi,
        ("nmi is over the geometric mean", "normalized_mutual_info_score(labels, ids",
         "normalized_mutual_info_score(labels, ids, average_method='geometric'"),
        ("nmi is over the larger entropy", "normalized_mutual_info_score(labels, ids",
         "normalized_mutual_info_score(labels, ids, average_method='max'"),
        ("nmi is not normalised", "normalized_mutual_info_score", "mutual_info_score")),
    *rows(of_groups.agreement, by_chance,
        ("ami is not corrected for chance", "adjusted_mutual_info_score", "normalized_mutual_info_score"),
        ("ari is not corrected for chance", "adjusted_rand_score", "rand_score")),
)

IMAGES = (
    *rows(Normaliser.pixels, nearer,
        ("levels of the data are truncated", ".round()", "")),
    *rows(images.to_images, nearer,
        ("levels of images are truncated", ".round()", "")),
    *rows(autoencoder.levels, decoder,
        ("levels of a decoder are truncated", ".round()", ""),
        ("levels of a decoder wrap around", ".clamp(0, TOP)", "")),
    *rows(net.FeatureNet.rows, fidelity_features,
        ("channels are BGR", ".expand(-1, 3, -1, -1)", ".expand(-1, 3, -1, -1).flip(1)")),
    *rows(net._filled, inception_anew,
        ("net is not in eval mode", ".float().eval()", ".float().train()")),
    *rows(net._inception, inception_anew,
        ("levels become 2x - 1", "mean=(128.0,)", "mean=(127.5,)", "std=(128.0,)", "std=(127.5,)")),
    *rows(net._effnet, effnet_oracle,
        ("levels of EfficientNet become (x - 128) / 128",
         "mean=(127.5,)", "mean=(128.0,)", "std=(127.5,)", "std=(128.0,)")),
    *rows(effnet.EffNet.forward, effnet_oracle,
        ("EfficientNet stops a stage early", "[: STAGE + 1]", "[:STAGE]")),
    *rows(net._of_timm, timm_features,
        ("mean and deviation of timm are of 0..1", "255 * v", "v")),
    *rows(net._resize_of, clean_features,
        ("every protocol has one resize", "FEATURES[protocol]", 'FEATURES["fid_adm"]')),
    *rows(resize.bicubic_antialiased, clean_resize,
        ("bicubic has no antialias", "antialias=True", "antialias=False"),
        ("bicubic aligns corners", "antialias=True, align_corners=False", "align_corners=True"),
        ("resize rounds to whole levels", ".clamp(0, 255)", ".clamp(0, 255).round()")),
    *rows(resize.bicubic_antialiased, clean_enlarged,
        ("bicubic leaves 0..255", ".clamp(0, 255)", "")),
    *rows(resize.tf1_bilinear, fidelity_large,
        ("bilinear is antialiased",
         "first + (second - first) * dy[:, None]",
         'F.interpolate(levels, (size, size), mode="bilinear", antialias=True)')),
    *rows(resize._neighbours, fidelity_features,
        ("bilinear shifts by half a pixel",
         "device=like.device) * scale", "device=like.device).add(0.5).mul(scale).sub(0.5).clamp_min(0)")),
    *rows(inception._mean_pool, fidelity_features,
        ("pools count the padding", "count_include_pad=False", "count_include_pad=True")),
    *rows(inception._E._forward, fidelity_features,
        ("last pool is a mean", "if self.last else", "if False else")),
    *rows(inception.Inception.logits, fidelity_features,
        ("logits have a bias", "features.mm(self.fc.weight.T)", "features.mm(self.fc.weight.T) + self.fc.bias")),
    *rows(inception.Inception.forward, spatial,
        ("spatial features are by channel", ".permute(0, 2, 3, 1)", "")),
)

SETS = (
    *rows(scores._nchw, adm,
        ("channels of a reference are BGR", "images, -1, 1", "images[..., ::-1], -1, 1")),
    *rows(beside._precision_recall, adm,
        ("precision and recall are swapped in scores",
         '"precision": both.precision, "recall": both.recall', '"precision": both.recall, "recall": both.precision'),
        ("k of scores is off by one", "k=evaluation.pr_k", "k=evaluation.pr_k + 1")),
    *rows(beside._inception_score, adm,
        ("a score's shuffle is forgotten", "seed=of.evaluation.is_seed", "seed=None")),
    *rows(beside._kid, adm,
        ("kid's sets are swapped", 'of.kept("kid"),\n        of.features', 'of.features,\n        of.kept("kid")')),
    *rows(scores.scores_of, adm,
        ("sFID is of other columns", "slice(net.width, net.width + net.spatial)", "slice(0, net.spatial)")),
    *rows(job.score, of_digits,
        ("a half of the floor is the whole", "between(Moments.of(reference[even])", "between(Moments.of(reference)"),
        ("samples of digits are compared with themselves",
         "Reference.of(Moments.of(reference))", "Reference.of(Moments.of(features))")),
)

# fmt: on

MUTATIONS = (*MOMENTS, *FRECHET, *SCORES, *NEIGHBOURS, *LABELS, *IMAGES, *SETS)
