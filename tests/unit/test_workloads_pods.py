"""The join of uids and names: what is certain gets a name, everything else stays without."""

import pytest

from jouletrace.workloads.pods import Claim, LivePod, PodName, PodNames, may_be

G0, G1 = "GPU-00000000-0000-4000-8000-000000000000", "GPU-00000000-0000-4000-8000-000000000001"
DEVICES = (G0, G1)
LLM, TRAIN = PodName("team-a", "llm-0"), PodName("team-b", "train-7")


def claim(pod: PodName, container: str, device_id: str, resource: str = "nvidia.com/gpu") -> Claim:
    return Claim(*pod, container, resource, device_id)


def live(uid: str, *devices: str, container: str = "main", seen_ns: int = 1) -> LivePod:
    return LivePod(uid, seen_ns, {container: frozenset(devices)})


def named(claims: list[Claim], *pods: LivePod, asked_ns: int = 2) -> dict[str, PodName | None]:
    names = PodNames()
    names.learn(claims, asked_ns)
    names.bind_listed(names.keep(pods), DEVICES, asked_ns)
    return {pod.uid: names[pod.uid] for pod in pods}


@pytest.mark.parametrize(
    ("device_id", "gpus"),
    [
        (G0, [G0]),
        (f"{G1}::3", [G1]),  # a time slice
        (f"MIG-{G1}/3/0", [G1]),  # before driver 470
        ("MIG-f3b4e9d0-0b0c-5b1b-9a51-5d0f1c9a2a11", [G0, G1]),
        ("1", [G0, G1]),  # the device plugin's deviceIDStrategy index, GKE's nvidia0/vgpu1
        ("nvidia0/vgpu1", [G0, G1]),
        ("GPU-99999999-0000-4000-8000-000000000009", []),  # one that is not watched
    ],
)
def test_which_gpu_an_id_may_be(device_id: str, gpus: list[str]) -> None:
    assert [gpu for gpu in DEVICES if may_be(claim(LLM, "main", device_id), gpu, DEVICES)] == gpus


def test_the_only_pod_that_holds_the_device_in_a_container_of_that_name() -> None:
    claims = [claim(LLM, "engine", G0), claim(TRAIN, "trainer", G1)]
    assert named(claims, live("u", G0, container="engine")) == {"u": LLM}
    assert named(claims, live("u", G1, container="engine")) == {"u": None}
    assert named(claims, live("u", G0, container="trainer")) == {"u": None}
    assert named(claims, live("u", G0, container="")) == {"u": LLM}, "its container is not known"
    assert named(claims, live("u", G0, G1, container="")) == {"u": None}, "it is on more than was claimed"
    both = LivePod("u", 1, {"engine": frozenset({G0}), "sidecar": frozenset({G0})})
    assert named(claims, both) == {"u": None}


def test_two_pods_with_like_containers_on_a_shared_gpu_have_no_names() -> None:
    claims = [claim(LLM, "main", f"{G0}::0"), claim(TRAIN, "main", f"{G0}::1")]
    assert named(claims, live("u", G0), live("v", G0)) == {"u": None, "v": None}


def test_two_uids_for_one_name_have_none() -> None:
    """One of them uses a GPU that it has not claimed."""
    assert named([claim(LLM, "main", G0)], live("u", G0), live("v", G0)) == {"u": None, "v": None}


def test_what_is_settled_leaves_less_to_choose_from() -> None:
    claims = [claim(LLM, "main", f"{G0}::0"), claim(TRAIN, "main", f"{G0}::1"), claim(TRAIN, "main", G1)]
    pods = (live("u", G0), live("v", G0, G1))
    assert named(claims, *pods) == {"u": LLM, "v": TRAIN}


def test_an_answer_older_than_the_pod_names_nobody() -> None:
    claims = [claim(LLM, "main", G0)]
    assert named(claims, live("u", G0, seen_ns=3), asked_ns=2) == {"u": None}
    assert named(claims, live("u", G0, seen_ns=3), asked_ns=3) == {"u": LLM}


def test_of_two_pods_listed_with_one_device_the_later_one_has_it() -> None:
    """The kubelet still lists a job's pod that has ended when the next one runs."""
    ended, runs = PodName("batch", "job-1"), PodName("batch", "job-2")
    names = PodNames()
    names.learn([claim(ended, "main", G0)], 1)
    names.learn([claim(ended, "main", G0), claim(runs, "main", G0)], 10)
    names.bind_listed([live("u", G0)], DEVICES, 10)
    assert names["u"] == runs
    # Both were there when jouletrace came: nobody can tell.
    assert named([claim(ended, "main", G0), claim(runs, "main", G0)], live("u", G0)) == {"u": None}


def test_a_claim_that_is_listed_again_may_be_an_ended_pods() -> None:
    """A kubelet that restarts may at first leave out what it then remembers."""
    ended, runs = PodName("batch", "job-1"), PodName("batch", "job-2")
    names = PodNames()
    names.learn([claim(ended, "main", G0)], 1)
    names.learn([claim(ended, "main", G0), claim(runs, "main", G0)], 2)
    names.learn([claim(runs, "main", G0)], 3)
    for asked_ns in (4, 5):
        names.learn([claim(ended, "main", G0), claim(runs, "main", G0)], asked_ns)
        names.bind_listed([live("u", G0)], DEVICES, asked_ns)
        assert names["u"] is None
    names.learn([claim(runs, "main", G0)], 6)
    names.bind_listed([live("u", G0)], DEVICES, 6)
    assert names["u"] == runs


def test_a_pod_that_comes_back_under_its_old_name() -> None:
    """A StatefulSet's: the same name, another uid."""
    names = PodNames()
    claims = [claim(LLM, "main", G0)]
    names.learn(claims, 2)
    names.bind_listed(names.keep([live("old", G0)]), DEVICES, 2)
    assert names["old"] == LLM
    names.learn(claims, 5)
    new = live("new", G0, seen_ns=4)
    names.bind_listed(names.keep([live("old", G0), new]), DEVICES, 5)
    assert names["new"] is None, "the old one still runs"
    names.bind_listed(names.keep([new]), DEVICES, 5)
    assert (names["old"], names["new"]) == (None, LLM)


def test_a_name_holds_until_the_last_process_is_gone() -> None:
    names = PodNames()
    names.learn([claim(LLM, "main", G0)], 2)
    pods = [live("u", G0)]
    names.bind_listed(names.keep(pods), DEVICES, 2)
    names.learn([], 3)
    assert names.keep(pods) == []
    assert names["u"] == LLM
    assert names.keep([]) == []
    assert names["u"] is None


def test_a_log_folder_settles_it_whatever_the_kubelet_lists() -> None:
    names = PodNames()
    pods = [live("u", G0), live("v", G0)]
    names.learn([claim(LLM, "main", f"{G0}::0"), claim(TRAIN, "main", f"{G0}::1")], 2)
    names.bind_logged(pods, {"v": TRAIN, "w": PodName("x", "y")})
    names.bind_listed(names.keep(pods), DEVICES, 2)
    assert (names["u"], names["v"], names["w"]) == (LLM, TRAIN, None)


def test_the_container_of_a_named_pod_by_its_claim() -> None:
    names = PodNames()
    names.bind_logged([live("u", G0)], {"u": LLM})
    assert names.container("u", G0, DEVICES) == ""
    names.learn([claim(LLM, "engine", G0), claim(LLM, "draft", G1), claim(TRAIN, "trainer", G0)], 2)
    assert names.container("u", G0, DEVICES) == "engine"
    assert names.container("u", G1, DEVICES) == "draft"
    names.learn([claim(LLM, "engine", f"{G0}::0"), claim(LLM, "draft", f"{G0}::1")], 3)
    assert names.container("u", G0, DEVICES) == ""
    assert names.container("unknown", G0, DEVICES) == ""
