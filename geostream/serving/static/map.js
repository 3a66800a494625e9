// The map: the layout's own tiles as the ground, the heat of an answer over them, and numbered places.
import { Map as GlMap, Marker, NavigationControl, ScaleControl, setWorkerUrl } from "./maplibre/maplibre-gl.mjs";

setWorkerUrl(new URL("./maplibre/maplibre-gl-worker.mjs", import.meta.url).href);

const NONE = { type: "FeatureCollection", features: [] };
const WAIT = 150; // milliseconds after a movement before the ground is asked for
const AGAIN = 8000; // after which tiles that could not be read are asked for again
const MARGIN = 60; // pixels around what is shown

const dark = matchMedia("(prefers-color-scheme: dark)");
const ground = () => (dark.matches ? "#222b29" : "#e3e8e6");

const points = (rows, properties) => ({
  type: "FeatureCollection",
  features: rows.map((row) => ({ type: "Feature", properties: properties(row), geometry: { type: "Point", coordinates: row.slice(0, 2) } })),
});

function around(coordinates) {
  const [longitudes, latitudes] = [0, 1].map((axis) => coordinates.map((point) => point[axis]));
  return [[Math.min(...longitudes), Math.min(...latitudes)], [Math.max(...longitudes), Math.max(...latitudes)]];
}

export class PlaceMap {
  // `choose(row)` is called when a numbered place on the map is chosen, `fail(text)` when tiles cannot be read.
  constructor(container, info, { choose, fail }) {
    this.info = info;
    this.chooseRow = choose;
    this.fail = fail;
    this.tiles = new Set(); // places whose tiles are on the map
    this.markers = [];
    const { west, south, east, north } = info.map.bounds;
    this.map = new GlMap({
      container,
      style: { version: 8, sources: {}, layers: [{ id: "ground", type: "background", paint: { "background-color": ground() } }] },
      bounds: [[west, south], [east, north]],
      fitBoundsOptions: { padding: MARGIN, maxZoom: 18 },
      maxZoom: 21,
      attributionControl: false, // the page shows the source of the tiles itself
      cooperativeGestures: matchMedia("(max-width: 760px)").matches, // one finger scrolls the page past the map
      dragRotate: false,
      pitchWithRotate: false,
      fadeDuration: 0,
    });
    this.map.touchZoomRotate.disableRotation();
    this.map.addControl(new NavigationControl({ showCompass: false }), "top-right");
    this.map.addControl(new ScaleControl(), "bottom-left");
    this.map.getCanvas().setAttribute("aria-label", "Map of the places; arrow keys move it, plus and minus zoom");
    dark.addEventListener("change", () => this.map.setPaintProperty("ground", "background-color", ground()));
    this.map.on("error", (event) => this.broken(event));
    this.ready = new Promise((done) => this.map.on("load", done)).then(() => this.prepare());
  }

  prepare() {
    const { map } = this;
    for (const name of ["cells", "heat"]) map.addSource(name, { type: "geojson", data: NONE });
    map.addLayer({
      id: "cells",
      type: "circle",
      source: "cells",
      paint: {
        "circle-color": "#0f766e",
        "circle-opacity": 0.55,
        "circle-radius": ["min", 11, ["+", 2.5, ["*", 1.2, ["ln", ["get", "count"]]]]],
      },
    });
    map.addLayer({
      id: "heat",
      type: "heatmap",
      source: "heat",
      paint: {
        "heatmap-weight": ["get", "weight"],
        "heatmap-intensity": 1.7,
        "heatmap-radius": 30,
        "heatmap-opacity": 0.62,
        "heatmap-color": ["interpolate", ["linear"], ["heatmap-density"],
          0, "rgba(59,15,112,0)", 0.12, "rgba(59,15,112,.75)", 0.4, "#b5367a", 0.7, "#fb8861", 1, "#fcfdbf"],
      },
    });
    map.on("moveend", () => this.move());
    return this.drawGround();
  }

  move() {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.drawGround(), WAIT);
    // Heat keeps its size on the ground, about a tile and a half, but never vanishes.
    const pixel = 40_075_017 * Math.cos((this.map.getCenter().lat * Math.PI) / 180) / (512 * 2 ** this.map.getZoom());
    const radius = Math.max(14, Math.min(160, (1.5 * this.info.map.tile_metres) / pixel));
    this.map.setPaintProperty("heat", "heatmap-radius", radius);
  }

  // Ask which tiles the view needs, and change the map's images to these.
  async drawGround() {
    this.request?.abort();
    this.request = new AbortController();
    const view = this.map.getBounds();
    const query = new URLSearchParams({
      west: view.getWest(), south: view.getSouth(), east: view.getEast(), north: view.getNorth(),
    });
    let found;
    try {
      const response = await fetch(`api/places?${query}`, { signal: this.request.signal });
      if (!response.ok) throw new Error((await response.json()).error);
      found = await response.json();
    } catch (error) {
      if (error.name !== "AbortError") this.fail(`The map cannot be drawn: ${error.message}`);
      return;
    }
    const wanted = new Set(found.tiles.map((tile) => tile.place));
    for (const place of [...this.tiles]) if (!wanted.has(place)) this.drop(place);
    for (const tile of found.tiles) if (!this.tiles.has(tile.place)) this.add(tile);
    this.map.getSource("cells").setData(points(found.cells, ([, , count]) => ({ count })));
  }

  add({ place, url, bounds: [west, south, east, north] }) {
    const id = `tile-${place}`;
    this.map.addSource(id, { type: "image", url, coordinates: [[west, north], [east, north], [east, south], [west, south]] });
    this.map.addLayer({ id, type: "raster", source: id, paint: { "raster-fade-duration": 0 } }, "cells");
    this.tiles.add(place);
  }

  drop(place) {
    this.map.removeLayer(`tile-${place}`);
    this.map.removeSource(`tile-${place}`);
    this.tiles.delete(place);
  }

  // Tiles that could not be read are asked for again, once for all of them.
  broken(event) {
    if (!event.sourceId?.startsWith("tile-")) return;
    this.fail("Some tiles of the map cannot be read just now; trying again.");
    this.lost ??= new Set();
    this.lost.add(Number(event.sourceId.slice(5)));
    this.later ??= setTimeout(() => {
      for (const place of this.lost) if (this.tiles.has(place)) this.drop(place);
      this.lost = this.later = undefined;
      this.drawGround();
    }, AGAIN);
  }

  clear() {
    for (const marker of this.markers) marker.remove();
    this.markers = [];
    this.places = [];
    this.ready.then(() => this.map.getSource("heat").setData(NONE));
  }

  show({ candidates, heat, truth }) {
    this.clear();
    this.places = candidates.map((candidate) => candidate.point);
    this.places.forEach((point, row) => {
      if (!point) return;
      const pin = document.createElement("button");
      Object.assign(pin, { type: "button", className: "pin", textContent: row + 1 });
      pin.setAttribute("aria-label", `Place ${row + 1} on the map`);
      pin.addEventListener("click", () => this.chooseRow(row, false));
      this.mark(pin, point);
    });
    if (truth) {
      const pin = document.createElement("div");
      Object.assign(pin, { className: "pin truth", textContent: "taken here" });
      this.mark(pin, truth, { anchor: "bottom", offset: [0, -20] }); // above the place, which may be the same spot
    }
    this.ready.then(() => this.map.getSource("heat").setData(points(heat, ([, , weight]) => ({ weight }))));
    const seen = [...this.places.filter(Boolean).slice(0, 1), ...(truth ? [truth] : [])];
    if (seen.length) this.fit(seen);
  }

  mark(element, point, options = {}) {
    this.markers.push(new Marker({ element, ...options }).setLngLat(point).addTo(this.map));
  }

  // Show these points, and at least some tiles around them.
  fit(coordinates) {
    const [[west, south], [east, north]] = around(coordinates);
    const high = (2.5 * this.info.map.tile_metres) / 111_319;
    const wide = high / Math.cos((north * Math.PI) / 180);
    this.map.fitBounds([[west - wide, south - high], [east + wide, north + high]], { padding: MARGIN, duration: 800 });
  }

  choose(row, fly) {
    this.markers.forEach((marker, number) => marker.getElement().classList.toggle("chosen", number === row));
    if (fly && this.places?.[row]) this.fit([this.places[row]]);
  }
}
