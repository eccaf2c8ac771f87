"""Every operation of torch's own C++ client, with torch's own server as the judge."""

from __future__ import annotations

from rank_process import RankProcess
from store_process import StoreProcess

EVERY_OPERATION = """
    def outcome(call):
        try:
            return call()
        except Exception as error:
            return [type(error).__name__, str(error).split(",")[0]]

    def play(store):
        said = [
            store.set("a", "1"), store.get("a"), store.set("a", b"bytes"), store.get("a"),
            store.set("empty", ""), store.get("empty"),
            store.add("n", 5), store.add("n", -7), store.get("n"), store.set("n", "40"),
            store.add("n", 2), store.check(["a"]), store.check(["a", "no"]), store.check([]),
            store.compare_set("a", "wrong", "2"), store.compare_set("a", "bytes", "2"), store.get("a"),
            store.compare_set("new", "", "3"), store.compare_set("other", "expected", "4"),
            store.check(["other"]),
            store.wait(["a", "n"]), store.wait(["a"], seconds(1)), store.wait([]),
            store.append("a", "tail"), store.get("a"), store.append("fresh", "tail"), store.get("fresh"),
            store.multi_set(["x", "y"], ["1", "22"]), store.multi_get(["x", "a", "y"]), store.multi_get([]),
            store.delete_key("x"), store.delete_key("x"), store.check(["x"]),
            store.queue_len("q"), store.queue_push("q", "1"), store.queue_push("q", "2"),
            store.queue_len("q"),
            store.check(["q"]), store.wait(["q"]), store.queue_pop("q"), store.queue_pop("q", False),
            outcome(lambda: store.queue_pop("q", False)), store.queue_len("q"), store.check(["q"]),
            store.barrier("bar", 1), store.barrier("bar", 1),
            outcome(lambda: store.wait(["never"], seconds(0.05))), store.get("y"),
            outcome(lambda: store.barrier("lonely", 2, seconds(0.05))), store.get("y"),
            store.num_keys(), sorted(store.list_keys()), store.has_extended_api(),
        ]
        twin = store.clone()
        twin.set("from the twin", "1")
        said += [store.get("from the twin"), twin.get("y")]
        prefixed = PrefixStore("p", store)
        prefixed.set("k", "v")
        return said + [prefixed.get("k"), store.get("p/k"), prefixed.list_keys(), prefixed.num_keys()]

    ours = play(connect(port))
    theirs = play(dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False))
    return [ours, theirs]
"""


def test_every_operation_answers_as_torchs_own_server(store: StoreProcess, rank: RankProcess) -> None:
    ours, theirs = rank.run(EVERY_OPERATION, port=store.port)
    assert ours == theirs
    assert len(ours) > 50


def test_values_of_every_size_come_back(store: StoreProcess, rank: RankProcess) -> None:
    took = rank.run(
        """
        store = connect(port)
        for size in (0, 1, 7, 8, 255, 4096, 65535, 262144, 262145, 3_000_000):
            value = os.urandom(size)
            store.set("v", value)
            assert store.get("v") == value, size
        value = os.urandom(100_000_000)
        began = time.perf_counter()
        store.set("big", value)
        assert store.get("big") == value
        return time.perf_counter() - began
        """,
        port=store.port,
    )
    assert took < 15  # about 0.6 s on an idle machine; quadratic copying would take minutes


def test_sixty_four_clients_at_once(store: StoreProcess, rank: RankProcess) -> None:
    total = rank.run(
        """
        from concurrent.futures import ThreadPoolExecutor
        def client(number):
            store = connect(port)
            store.set(f"from/{number}", str(number))
            store.add("arrived", 1)
            values = store.multi_get([f"from/{other}" for other in range(64)])
            store.barrier("all", 64)
            return sum(map(int, values)) + int(store.get("arrived"))
        with ThreadPoolExecutor(64) as pool:
            return sum(pool.map(client, range(64)))
        """,
        port=store.port,
    )
    assert total == 64 * (sum(range(64)) + 64)
    assert store.call("counters")["connections"] == 64
