"""A small dataset in the files that tensorflow-datasets reads, written without TensorFlow."""

import io
import json

import numpy as np

FEATURES = "tensorflow_datasets.core.features"


def image(*shape):
    """An Image feature as in features.json; a size of -1 is any."""
    dimensions = {"dimensions": [str(n) for n in shape]}
    return {
        "pythonClassName": f"{FEATURES}.image_feature.Image",
        "image": {"dtype": "uint8", "shape": dimensions},
    }


def label(classes):
    return {
        "pythonClassName": f"{FEATURES}.class_label_feature.ClassLabel",
        "classLabel": {"numClasses": str(classes)},
    }


TEXT = {"pythonClassName": f"{FEATURES}.text_feature.Text", "text": {}}
GOOD = {"image": image(4, 5, 3), "label": label(3)}


def examples(count, seed):
    """Random images `[count, 4, 5, 3]` and labels 0, 1, 2, 0, 1, ..."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 4, 5, 3))
    return pixels.astype(np.uint8), np.arange(count) % 3


def write(data_dir, path, splits, features=GOOD, file_format="array_record"):
    """Writes the set at "name/version" or "name/config/version"; returns its folder."""
    (name, *config, version), folder = path.split("/"), data_dir / path
    folder.mkdir(parents=True)
    kind = {"pythonClassName": f"{FEATURES}.features_dict.FeaturesDict"}
    described = kind | {"featuresDict": {"features": features}}
    (folder / "features.json").write_text(json.dumps(described))
    info = {"name": name, "version": version, "fileFormat": file_format}
    info["splits"] = [
        {
            "name": split,
            "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            "numBytes": "1000",
            "shardLengths": [str(len(labels))],
        }
        for split, (_, labels) in splits.items()
    ]
    if config:
        info["configName"] = config[0]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    for split, (images, labels) in splits.items():
        records = folder / f"{name}-{split}.{file_format}-00000-of-00001"
        records.touch()
        if file_format == "array_record":
            write_records(records, images, labels)
    return folder


def write_records(path, images, labels):
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter
    from PIL import Image
    from tensorflow_datasets.core.example_serializer import ExampleSerializer

    features = tfds.features.FeaturesDict(
        {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=3)}
    )
    serializer = ExampleSerializer(features.get_serialized_info())
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for pixels, number in zip(images, labels, strict=True):
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "png")
        example = {"image": png.getvalue(), "label": int(number)}
        writer.write(serializer.serialize_example(example))
    writer.close()
