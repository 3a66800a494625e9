"""Run the whole loop by the library: plan, stream, train, mine and evaluate, then look at what the run left behind.

    python examples/render_a_store.py /tmp/store
    python examples/train_and_evaluate.py /tmp/store

The command ``geostream train`` does the same. Cut off and started again, the run goes on behind its last checkpoint;
finished, it is found so.
"""

import sys

import geostream

SETTINGS = [
    "epochs=4",
    "batch_size=16",
    "first_mining=1",
    "mine_every=1",
    "evaluate_every=2",
    "neighbours=16",
    "learning_rate=1e-3",
]


def main(store_url: str) -> None:
    """Train four epochs: two planned by geographic neighbours, two by neighbours mined two epochs before."""
    store = geostream.Store.open(store_url)
    layout = geostream.open_layout(store)
    settings = geostream.parse_settings(SETTINGS, geostream.default_settings(layout.dataset))
    result = geostream.train(store, layout, "example", settings)
    for planned, trained in zip(result.plans, result.training, strict=True):
        print(f"epoch {planned['epoch']}: planned by {planned['source']} neighbours, loss {trained['loss']:.3f}")
    for evaluation in result.evaluations:
        print(f"epoch {evaluation['epoch']}: R@1 {evaluation['r1']:.1%}, R@5 {evaluation['r5']:.1%} on the test split")

    # Everything that the run made is in its folder, to be opened again: plans, graphs, embeddings.
    run = geostream.Run.open(store, layout, "example")
    mined = run.newest_embeddings()
    graph = run.graph(mined)
    print(f"epoch 4 was planned from {graph.name}: {len(graph.places)} places, {graph.k} neighbours each")
    embeddings = run.embeddings("train", mined)
    seen = geostream.evaluate_embeddings(run.layout, embeddings)
    print(f"R@1 {seen.r1:.1%} on the {embeddings.split} split, whose places were trained on")


if __name__ == "__main__":
    main(sys.argv[1])
