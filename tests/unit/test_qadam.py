"""The QAdam optimizer by itself: warm-up is Adam, freezing, what it refuses."""

import copy
import inspect
import io
import math
import pickle
import warnings

import pytest
import torch

from helpers.tensors import assert_same_bits
from lightning_accel import QAdam, QAdamOptimizer
from lightning_accel.optim import Phase
from lightning_accel.optim.bagua_qadam import BaguaQAdam
from lightning_accel.optim.warmup import WarmupAgreement


def parameters(dtype=torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(3)
    return [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in ((40, 30), (30,), (3, 2, 5), ())]


def give_gradients(tensors, step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)


@pytest.fixture(autouse=True)
def _alone(recwarn):
    """QAdam warns that it is plain Adam without its algorithm; most tests here want just that."""


@pytest.mark.parametrize("decoupled", [False, True])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("implementation", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_warmup_is_adam_to_the_bit(weight_decay, decoupled, implementation):
    """Catches any deviation from torch's own step: bias correction, decay, order of operations."""
    ours, theirs = parameters(), parameters()
    arguments = {"lr": 0.01, "betas": (0.8, 0.99), "eps": 1e-6, "weight_decay": weight_decay, **implementation}
    optimizer = QAdam(ours, warmup_steps=1000, decoupled_weight_decay=decoupled, **arguments)
    adam = (torch.optim.AdamW if decoupled else torch.optim.Adam)(theirs, **arguments)
    for step in range(50):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        adam.step()
    for one, two in zip(ours, theirs, strict=True):
        assert_same_bits(one.data, two.data)


def test_fused_is_the_default_and_agrees_with_the_others():
    ours, theirs = parameters(), parameters()
    optimizer, adam = QAdam(ours, warmup_steps=1000), torch.optim.Adam(theirs, foreach=False)
    assert optimizer.param_groups[0]["fused"]
    for step in range(50):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimizer.step()
        adam.step()
    for one, two in zip(ours, theirs, strict=True):
        assert torch.allclose(one, two, atol=1e-6, rtol=0)


def test_a_step_runs_hooks_once_and_calls_the_closure():
    """Catches the hooks that torch wraps around Adam's step running beside those of QAdam's."""
    torch.optim.Adam(parameters())  # makes torch wrap Adam's step
    tensors, calls = parameters(), []
    optimizer = QAdam(tensors)
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))

    def closure():
        assert torch.is_grad_enabled()
        calls.append("closure")
        give_gradients(tensors, 0)
        return torch.tensor(2.5)

    assert optimizer.step(closure) == 2.5
    assert calls == ["before", "closure", "after"]


def test_the_state_is_adams():
    """Catches a checkpoint that Adam's tools do not understand, and the other way."""
    tensors = parameters()
    optimizer = QAdam(tensors, warmup_steps=7)
    for step in range(3):
        give_gradients(tensors, step)
        optimizer.step()
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert set(saved["state"][0]) == {"step", "exp_avg", "exp_avg_sq"}
    adam = torch.optim.Adam(parameters())
    adam.load_state_dict(saved)
    assert adam.state_dict()["state"][0]["step"] == 3
    again = QAdam(parameters(), warmup_steps=50)
    again.load_state_dict(saved)
    assert (again.steps, again.warmup_steps, again.phase) == (3, 7, Phase.WARMUP)
    of_adam = adam.state_dict()
    for name in ("steps", "frozen_step", "warmup_steps", "bagua_compat"):
        del of_adam["param_groups"][0][name]
    from_adam = QAdam(parameters(), warmup_steps=50)
    from_adam.load_state_dict(of_adam)
    assert (from_adam.steps, from_adam.warmup_steps) == (3, 50)


@pytest.mark.parametrize("bagua_compat", [False, True])
def test_copies_keep_their_phase(bagua_compat):
    """Catches a copy that forgets its class, and with it whose arithmetic it has. Lightning makes shallow copies."""
    tensors = parameters()
    optimizer = QAdam(tensors, warmup_steps=2, bagua_compat=bagua_compat)
    for step in range(2):
        give_gradients(tensors, step)
        optimizer.step()
    optimizer.freeze()
    for other in (copy.copy(optimizer), copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is (BaguaQAdam if bagua_compat else QAdam)
        assert (other.phase, other.steps, other.warmup_steps) == (Phase.COMPRESSED, 2, 2)
        assert other.bagua_compat is other.param_groups[0]["bagua_compat"] is other.defaults["bagua_compat"] is bagua_compat
        other.zero_grad()
        other.step()
        assert other.steps == 3
    assert QAdamOptimizer is QAdam


def test_bagua_compat_makes_the_subclass():
    """Catches a keyword that is taken and changes nothing, and a signature that hides the arguments."""
    optimizer = QAdam(parameters(), warmup_steps=7, bagua_compat=True)
    assert type(optimizer) is BaguaQAdam
    assert isinstance(optimizer, QAdam)
    assert (optimizer.bagua_compat, optimizer.warmup_steps, optimizer.default_error_feedback) == (True, 7, False)
    assert optimizer.param_groups[0]["bagua_compat"] is True
    assert type(QAdam(parameters())) is QAdam
    assert type(BaguaQAdam(parameters())) is BaguaQAdam
    assert list(inspect.signature(QAdam).parameters)[:3] == ["params", "lr", "warmup_steps"]

    class OfUser(QAdam):
        def __init__(self, tensors, **options):
            super().__init__(tensors, lr=0.5, **options)

    assert list(inspect.signature(OfUser).parameters) == ["tensors", "options"]
    assert OfUser(parameters()).param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match=r"needs a subclass of lightning_accel\.optim\.bagua_qadam\.BaguaQAdam: got OfUser"):
        OfUser(parameters(), bagua_compat=True)


@pytest.mark.parametrize("saved", [False, True])
def test_a_state_of_the_other_arithmetic_is_refused(saved):
    """Catches a resumed run that silently goes on with another arithmetic, and a refusal that leaves a mixture behind."""
    tensors, others = parameters(), parameters()
    optimizer, other = QAdam(tensors, lr=0.5, bagua_compat=saved), QAdam(others, lr=0.1, bagua_compat=not saved)
    give_gradients(tensors, 0)
    optimizer.step()
    with pytest.raises(ValueError, match=rf"make the optimizer with QAdam\(\.\.\., bagua_compat={saved}\)"):
        other.load_state_dict(optimizer.state_dict())
    assert (other.steps, other.loads, other.param_groups[0]["lr"], len(other.state)) == (0, 0, 0.1, 0)
    with pytest.raises(ValueError, match=f"this optimizer has bagua_compat={not saved}"):
        QAdam([{"params": parameters(), "bagua_compat": saved}], bagua_compat=not saved)
    again = QAdam(parameters(), bagua_compat=saved)
    again.load_state_dict(optimizer.state_dict())
    assert (again.steps, again.bagua_compat) == (1, saved)


def test_the_first_step_after_warmup_by_hand():
    """Catches a wrong bias correction on either side, a momentum that is not taken up, and an eps in the wrong place."""
    x = torch.nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = QAdam([x], lr=0.1, warmup_steps=2, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.5, decoupled_weight_decay=True)
    for gradient in ([1.0, 4.0], [3.0, -2.0]):
        x.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
    variance = [0.99 * 0.01 * 1 + 0.01 * 9, 0.99 * 0.01 * 16 + 0.01 * 4]
    before, momentum = x.detach().clone(), [0.7, -0.2]
    optimizer.freeze()
    x.grad = torch.tensor(momentum, dtype=torch.float64)
    optimizer.note_folded([x])
    optimizer.step()
    for k in range(2):
        quotient = momentum[k] / (1 - 0.9**3) / (math.sqrt(variance[k] / (1 - 0.99**2)) + 1e-3)
        assert x[k].item() == pytest.approx(before[k].item() * (1 - 0.1 * 0.5) - 0.1 * quotient, rel=1e-12)
        assert optimizer.state[x]["exp_avg"][k] == momentum[k]
    assert optimizer.state[x]["step"] == 3
    assert torch.allclose(optimizer.state[x]["exp_avg_sq"], torch.tensor(variance, dtype=torch.float64), rtol=1e-12)


def test_what_warmup_has_not_seen_does_not_explode():
    """Catches Adam's quotient at a variance of 0 or next to it: 0.1 g / eps moves an element by 10 where others move by 1e-3.

    The floor is median / B^2: a gradient of the usual size g moves an element by at most 0.1 B = 0.73 lr at once, and by B lr in
    the long run, which is as far as Adam could.
    """
    seen, unseen = torch.nn.Parameter(torch.zeros(100)), torch.nn.Parameter(torch.zeros(5))
    optimizer = QAdam([seen, unseen], lr=1e-3, warmup_steps=20)
    for step in range(20):
        gradient = torch.full((100,), 1e-3 if step % 2 else -1e-3)
        gradient[:10] = 0.0
        gradient[10] = 1e-12
        seen.grad, unseen.grad = gradient, torch.zeros(5)
        optimizer.step()
    optimizer.freeze()
    bound = 0.1 / math.sqrt(0.001 * (1 - 0.81 / 0.999))
    assert bound == pytest.approx(7.27, abs=0.01)
    variance = optimizer.state[seen]["exp_avg_sq"]
    assert torch.allclose(variance[:11], variance[50] / bound**2, rtol=1e-5)
    assert (optimizer.state[unseen]["exp_avg_sq"] == variance[0]).all()
    before = seen.detach().clone()
    seen.grad, unseen.grad = torch.full((100,), 1e-4), torch.full((5,), 1e-4)  # the first momentum of a gradient of 1e-3
    optimizer.note_folded([seen, unseen])
    optimizer.step()
    moved = (seen - before).abs() / 1e-3
    assert moved[:11].tolist() == pytest.approx([0.1 * bound / (1 - 0.9**21)] * 11, rel=1e-2)
    assert unseen.abs().max() / 1e-3 < bound


def test_no_gradient_in_warmup_is_refused():
    x = torch.nn.Parameter(torch.zeros(3))
    optimizer = QAdam([x], warmup_steps=1)
    x.grad = torch.zeros(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="no gradient was different from zero"):
        optimizer.freeze()


def test_a_parameter_that_was_stepped_less_is_corrected():
    """Catches a frozen variance that is corrected with steps in which its parameter had no gradient."""
    often, seldom = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3))
    optimizer = QAdam([often, seldom], warmup_steps=10)
    for step in range(10):
        often.grad = torch.ones(3)
        seldom.grad = torch.ones(3) if step < 2 else None
        optimizer.step()
    optimizer.freeze()
    expected = torch.ones(3)  # gradients of 1 have a corrected variance of 1
    for x in (often, seldom):
        assert torch.allclose(optimizer.state[x]["exp_avg_sq"] / (1 - 0.999**10), expected, rtol=1e-4)


@pytest.mark.parametrize("warmup_steps", [0, -1, 1.5, True, "later", None])
def test_warmup_steps_are_checked(warmup_steps):
    with pytest.raises(ValueError, match="warmup_steps must be a number of steps, at least 1, or 'auto': got"):
        QAdam(parameters(), warmup_steps=warmup_steps)


def test_betas_without_a_bound_are_refused():
    with pytest.raises(ValueError, match=r"beta1\^2 < beta2"):
        QAdam(parameters(), betas=(0.9, 0.8))
    with pytest.raises(ValueError, match="Invalid learning rate"):
        QAdam(parameters(), lr=-1.0)


def test_plain_use_warns_once():
    """Catches a user who returns QAdam and forgets the algorithm: nothing would be compressed."""
    tensors = parameters()
    optimizer = QAdam(tensors)
    give_gradients(tensors, 0)
    with pytest.warns(UserWarning, match="QAdam without algorithm 'qadam' is plain Adam"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_a_gradient_scaler_is_refused_after_warmup():
    """Catches momentum that is divided by a loss scale; in warm-up a scaler skips and unscales as with any optimizer."""
    tensors = parameters()
    optimizer, scaler = QAdam(tensors, warmup_steps=2, fused=True), torch.amp.GradScaler("cpu", init_scale=4.0)
    for step in range(2):
        optimizer.zero_grad()
        scaler.scale(sum(x.square().sum() for x in tensors)).backward()
        if step == 0:
            tensors[1].grad[3] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.steps == 1, "a skipped step is no step"
    assert optimizer.state[tensors[0]]["step"] == 1
    optimizer.freeze()
    optimizer.zero_grad()
    scaler.scale(sum(x.square().sum() for x in tensors)).backward()
    with pytest.raises(RuntimeError, match="under a gradient scaler after warm-up"):
        scaler.step(optimizer)
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    disabled.step(optimizer)
    assert optimizer.steps == 2


def test_parameters_cannot_join_late():
    x = torch.nn.Parameter(torch.ones(3))
    optimizer = QAdam([x], warmup_steps=1)
    x.grad = torch.ones(3)
    optimizer.step()
    optimizer.freeze()
    with pytest.raises(RuntimeError, match="cannot join a QAdam after warm-up"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_step(dtype):
    """Catches a kernel that reads another dtype than the parameter's."""
    tensors = parameters(dtype)
    optimizer = QAdam(tensors, warmup_steps=3)
    for step in range(3):
        give_gradients(tensors, step)
        optimizer.step()
    optimizer.freeze()
    expected = []
    give_gradients(tensors, 5)
    for x in tensors:
        momentum, variance = x.grad.double(), optimizer.state[x]["exp_avg_sq"].double()
        quotient = momentum / ((variance / (1 - 0.999**3)).sqrt() + 1e-8)
        expected.append(x.detach().double() - 1e-3 / (1 - 0.9**4) * quotient)
    optimizer.note_folded(tensors)
    optimizer.step()
    for x, wanted in zip(tensors, expected, strict=True):
        assert torch.allclose(x.double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def frozen(tensors, **options) -> QAdam:
    """After two steps of warm-up."""
    optimizer = QAdam(tensors, warmup_steps=2, **options)
    for step in range(2):
        give_gradients(tensors, step)
        optimizer.step()
    optimizer.freeze()
    return optimizer


def test_gradients_that_nobody_folded_are_folded():
    """Catches raw gradients taken for momentum: of parameters outside of the wrapped model, or in a run without the algorithm."""
    tensors = parameters()
    optimizer = frozen(tensors, weight_decay=0.1)
    before = [(x.detach().clone(), optimizer.state[x]["exp_avg"].clone()) for x in tensors]
    give_gradients(tensors, 7)
    gradients = [x.grad.clone() for x in tensors]
    given = tensors[1].grad
    optimizer.note_folded(tensors[1:2])
    optimizer.step()
    for k, (x, (old, momentum)) in enumerate(zip(tensors, before, strict=True)):
        expected = given if k == 1 else 0.9 * momentum + (1 - 0.9) * (gradients[k] + 0.1 * old)
        assert torch.allclose(optimizer.state[x]["exp_avg"], expected, rtol=1e-6, atol=1e-9)
    give_gradients(tensors, 8)
    momentum = optimizer.state[tensors[1]]["exp_avg"].clone()
    gradient = tensors[1].grad.clone()
    optimizer.step()  # what was noted was for one step
    assert not torch.equal(optimizer.state[tensors[1]]["exp_avg"], gradient)
    assert not torch.equal(optimizer.state[tensors[1]]["exp_avg"], momentum)


def test_a_state_in_another_memory_format_is_laid_anew():
    """Catches kernels that walk through memory and pair the wrong elements."""
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        x = torch.nn.Parameter(torch.randn(4, 3, 5, 5))
        optimizer = frozen([x])
        x.data = x.data.contiguous(memory_format=memory_format)
        x.grad = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(1))
        optimizer.step()
        results.append(x.detach().contiguous())
    assert_same_bits(*results)
    sliced = torch.nn.Parameter(torch.zeros(4, 8)[:, :4])
    with pytest.raises(ValueError, match="lie densely in memory"):
        QAdam([sliced]).attach()


def test_a_group_may_be_without_gradients():
    """Catches a crash when a part of the model is frozen, or unused in a step."""
    first, second = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    optimizer = QAdam([{"params": [first]}, {"params": [second]}], warmup_steps=1)
    first.grad, second.grad = torch.ones(5), torch.ones(5)
    optimizer.step()
    optimizer.freeze()
    before, first.grad = first.detach().clone(), None
    optimizer.step()
    assert torch.equal(first, before)
    assert not torch.equal(second, before)


def test_a_block_that_is_not_finite_changes_nothing():
    """Catches a NaN on one rank that stays in momentum and weights for good."""
    x = torch.nn.Parameter(torch.ones(300))
    optimizer = frozen([x])
    before, momentum = x.detach().clone(), optimizer.state[x]["exp_avg"].clone()
    x.grad = torch.full((300,), 0.5)
    x.grad[100:200] = float("nan")
    optimizer.note_folded([x])
    optimizer.step()
    bad = torch.zeros(300, dtype=torch.bool)
    bad[100:200] = True
    assert torch.equal(x[bad], before[bad])
    assert torch.equal(optimizer.state[x]["exp_avg"][bad], momentum[bad])
    assert (x[~bad] != before[~bad]).all()
    assert (optimizer.state[x]["exp_avg"][~bad] == 0.5).all()


def test_groups_are_checked_whenever_they_come():
    x, y = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = QAdam([x], warmup_steps=2)
    x.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(ValueError, match=r"beta1\^2 < beta2"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "betas": (0.9, 0.5)})
    with pytest.raises(ValueError, match="does not take maximize"):
        QAdam([{"params": [x], "maximize": True}])
    optimizer = QAdam([x], warmup_steps=2)
    optimizer.step()
    optimizer.add_param_group({"params": [y]})
    y.grad = torch.ones(3)
    optimizer.step()
    optimizer.freeze()
    before = y.detach().clone()
    optimizer.step()
    assert ((y - before).abs() > 1e-4).all(), "a group that joined late must go on"


class Ranks:
    """What the other ranks answer: the least of `others` and this rank's value."""

    def __init__(self, *others):
        self.others = others
        self.asked = []

    def agree(self, value):
        self.asked.append(value)
        return min(value, *self.others)


def test_warmup_ends_when_all_ranks_have_made_the_steps():
    """Catches an end that one rank decides by itself, and ranks that ask each other in every round."""
    ranks = Ranks(3)
    warmup = WarmupAgreement(ranks.agree)
    ended = []
    for step in range(8):
        ranks.others = (step if step < 3 else step - 1,)  # its scaler skips the third step
        ended.append(warmup.ends(step, interval=5))
    assert ended == [False] * 6 + [True] * 2
    assert ranks.asked[:3] == [0, 5, 6]


def test_a_loaded_state_is_counted_anew():
    ranks = Ranks(10)
    warmup = WarmupAgreement(ranks.agree)
    assert [warmup.ends(step, interval=4) for step in range(3)] == [False] * 3
    warmup.recount()
    assert [warmup.ends(step, interval=4) for step in range(5)] == [False] * 4 + [True]
    assert ranks.asked == [0, 0, 4]


def test_warmup_ends_by_itself_when_the_variance_has_settled_on_all_ranks():
    """Catches a rank that looks at its own variance alone, and a comparison with the step before instead of the interval's."""
    norms = {10: 1.0, 20: 1.5, 30: 1.55, 40: 1.5}
    others_have_settled = False
    warmup = WarmupAgreement(lambda value: min(value, int(others_have_settled)) if value == 1 else value)

    def ends(step):
        return warmup.ends(step, interval=10, norm=lambda: norms[step])

    assert not any(ends(step) for step in range(40))
    saved = warmup.state_dict()
    assert saved == {"due_step": 40, "last_norm": 1.55}, "this rank's variance has settled at step 30, another's has not"
    others_have_settled = True
    assert ends(40)
    resumed = WarmupAgreement(lambda value: value)
    resumed.load_state_dict(saved)
    assert resumed.ends(40, interval=10, norm=lambda: 1.55 * 0.96)
    resumed.load_state_dict(saved)
    assert not resumed.ends(40, interval=10, norm=lambda: 1.55 * 0.959)


def test_weight_decay_stays_decoupled_when_a_state_does_not_say():
    """Catches an AdamW checkpoint of an older torch that turns decoupled weight decay into L2."""
    tensors = parameters()
    optimizer = QAdam(tensors, weight_decay=0.1, decoupled_weight_decay=True)
    state = optimizer.state_dict()
    del state["param_groups"][0]["decoupled_weight_decay"]
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["decoupled_weight_decay"] is True
