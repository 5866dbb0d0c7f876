// Tiles of images: read and transformed into matrices whose rows are tiles, and back.
#pragma once

#include "winograd.h"
#include "winograd_product.h"

namespace hpctrain::HPCTRAIN_ISA::winograd {

// An array (N, D, H, W, C) of which T is float or const float. Planes from `complete` on lack the last row, and the
// last column of all lacks its last channels: zeros.
template <class T>
struct Image {
    T* data;
    Strides stride;
    Sizes extent;
    Index channels, complete = extent[0], lacked = 0;
};

// Where tile `column` of the plane lies: its sample, its first row and column, and whether others lie above and left.
struct Place {
    Index n, row, col;
    bool below, right;  // there is a tile above; there is one to the left
};

// The tiles of a plane of all samples, numbered sample by sample, row by row.
struct Tiles {
    int edge;                              // points of a tile per dim
    Index samples, outputs, down, across;  // outputs: of a tile, in either dim
    TileAnchor anchor;

    Tiles(const Convolution& c, int edge, TileAnchor anchor)
        : edge(edge),
          samples(c.samples),
          outputs(outputs_of(int(c.kernel[1]), edge)),
          down(ceil_div(c.output[1] + anchor.h, outputs)),
          across(ceil_div(c.output[2] + anchor.w, outputs)),
          anchor(anchor) {}
    int points() const { return edge * edge; }
    Index count() const { return samples * down * across; }
    Place place(Index column) const {
        const Index j = column % across, i = column / across % down;
        return {column / across / down, i * outputs - anchor.h, j * outputs - anchor.w, i > 0, j > 0};
    }
};

// Tiles [column, column + columns) of planes [plane, plane + planes). They are rows of matrices, plane by plane.
struct Block {
    Index column, columns, plane, planes;
    Index rows() const { return columns * planes; }
};

inline Index clip(Index value, Index low, Index high) { return value < low ? low : value > high ? high : value; }

// The elements of a tile of EDGE x EDGE at `place` that an image has: [top, bottom) x [left, right).
template <class T, int EDGE>
struct Patch {
    T* data;
    Index first, row_step, col_step;       // first: offset of the tile's first element, which need not exist
    int top, bottom, left, right, ragged;  // ragged: the column that lacks channels

    Patch(const Image<T>& image, const Place& place, Index plane)
        : data(image.data),
          first(place.n * image.stride[0] + plane * image.stride[1] + place.row * image.stride[2] +
                place.col * image.stride[3]),
          row_step(image.stride[2]),
          col_step(image.stride[3]),
          top(int(clip(-place.row, 0, EDGE))),
          bottom(int(clip(image.extent[1] - (plane >= image.complete) - place.row, top, EDGE))),
          left(int(clip(-place.col, 0, EDGE))),
          right(int(clip(image.extent[2] - place.col, left, EDGE))),
          ragged(image.lacked && image.extent[2] - place.col <= EDGE ? right - 1 : EDGE) {
        if (plane < 0 || plane >= image.extent[0]) bottom = top;
    }
    bool whole() const { return top == 0 && left == 0 && bottom == EDGE && right == EDGE && ragged == EDGE; }
    bool empty() const { return top == bottom || left == right; }
    bool has(int i, int j) const { return i >= top && i < bottom && j >= left && j < right; }
    T* at(int i, int j) const { return data + (first + i * row_step + j * col_step); }
};

// The channels of one vector: all W, or the first n.
struct Full {
    V read(const float* p) const { return load(p); }
    void write(float* p, V v) const { store(p, v); }
};
struct Tail {
    int n;
    V read(const float* p) const { return load(p, n); }
    void write(float* p, V v) const { store(p, v, n); }
};

// Calls work(lanes, whole) with a Full or a Tail for `rest` channels, and the truth of `whole` known to the compiler.
template <class Work>
inline void with_lanes(Index rest, bool whole, Work work) {
    struct Yes {
        constexpr operator bool() const { return true; }
    };
    struct No {
        constexpr operator bool() const { return false; }
    };
    if (rest >= W) {
        whole ? work(Full{}, Yes{}) : work(Full{}, No{});
    } else {
        whole ? work(Tail{int(rest)}, Yes{}) : work(Tail{int(rest)}, No{});
    }
}

// Transforms tiles of a block into rows [begin, end) of `to`. Planes of the block may lie outside of the image: zeros.
template <class Transform>
void read_tiles(const Image<const float>& image, const Tiles& tiles, const Block& block, const Matrices& to,
                Index begin, Index end) {
    for (Index row = begin; row < end; ++row) {
        const Patch<const float, Transform::FROM> patch(image, tiles.place(block.column + row % block.columns),
                                                        block.plane + row / block.columns);
        const bool whole = patch.whole(), empty = patch.empty();
        for (Index panel = 0; panel < to.panels; ++panel) {
            const int width = to.width(panel);
            float* first = to.panel(panel) + row * width * W;
            for (int j = 0; j < width; ++j) {
                const Index channel = (to.first(panel) + j) * W, point = to.point;
                const auto write = [=](int f, int g, V v) {
                    store(first + j * W + (f * Transform::TO + g) * point, v);
                };
                if (empty) {
                    for (int f = 0; f < to.points; ++f) write(0, f, V{});
                    continue;
                }
                with_lanes(image.channels - channel, whole, [&](auto lanes, auto all) {
                    both_dims<Transform>(
                        [&](int f, int g) {
                            if (all) return lanes.read(patch.at(f, g) + channel);
                            if (!patch.has(f, g)) return V{};
                            if (g < patch.ragged) return lanes.read(patch.at(f, g) + channel);
                            return load(patch.at(f, g) + channel,
                                        int(clip(image.channels - image.lacked - channel, 0, W)));
                        },
                        write);
                });
            }
        }
    }
}

// The panels [first, last) of the products `from` become outputs of a kernel KERNEL x KERNEL.
template <int KERNEL, int EDGE>
void write_outputs(const Image<float>& y, const Tiles& tiles, const Block& block, const Matrices& from, Index first,
                   Index last, const Epilogue&);

// Rows of an image, from `row` of `sample` on, that another thread writes to: here go this one's shares.
struct Seam {
    Image<float> rows;  // none if null
    Index sample, row;
};

// The panels [first, last) of the products `from` become shares of the gradient by the inputs. Each tile covers
// KERNEL - 1 rows and columns that the tiles above and to the left cover too: as tiles come in the order of their
// numbers, the first one there stores and later ones add. Shares of the rows of a seam go there.
template <int KERNEL, int EDGE>
void write_input_gradients(const Image<float>& dx, const Tiles& tiles, const Block& block, const Matrices& from,
                           Index first, Index last, const Seam& seam);

}  // namespace hpctrain::HPCTRAIN_ISA::winograd
