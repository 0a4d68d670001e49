// The scheduler of the shim: runs a launch of a kernel, found by its name, thread block by thread block.
//
// Several thread blocks are resident at a time. Within a warp the lanes are resumed one after the other;
// which warp goes on, and now and then which lane, is drawn from the launch's seed.
#include "shim.h"

#include <dlfcn.h>

#include <cstdio>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "fiber.h"

namespace shim {

Place* place = nullptr;

namespace {

constexpr int MAX_ARGUMENTS = 32;
constexpr unsigned GIVE_WAY_ONE_IN = 8;
constexpr unsigned LEAVE_WARP_ONE_IN = 16;

enum class State { Runnable, Collective, Barrier, Finished };

struct Thread {
    Place place;
    Context context;
    State state = State::Finished;
    struct Warp* warp = nullptr;
    unsigned lane = 0;
    Op op = Op::Sync;
    unsigned mask = 0, operand = 0;
    std::uint64_t value = 0, result = 0;
};

struct Warp {
    struct Block* block = nullptr;
    std::vector<std::unique_ptr<Thread>> lanes;
    unsigned runnable = 0;
};

struct Block {
    std::vector<std::unique_ptr<Warp>> warps;
    unsigned threads = 0, finished = 0, waiting = 0, votes = 0, verdict = 0;
    std::unordered_map<const void*, std::vector<std::uint64_t>*> shared;
    std::vector<std::uint64_t>* dynamic = nullptr;
    bool live = false;
};

struct Launch {
    void* kernel = nullptr;
    std::uint64_t args[MAX_ARGUMENTS] = {};
    unsigned grid = 0, size = 0;
    std::size_t shared_bytes = 0;
    std::minstd_rand random;
};

Launch* launch = nullptr;
Thread* current = nullptr;
Context scheduler;
std::string failure;

unsigned draw(unsigned below) { return (unsigned)(launch->random() >> 4) % below; }

std::string name_of(const Thread& thread) {
    const Place& place = thread.place;
    return "thread " + std::to_string(place.thread.x) + " of block " + std::to_string(place.block.x);
}

void resume(Thread& thread, Context& from) {
    current = &thread;
    place = &thread.place;
    switch_to(from, thread.context);
}

// Leaves the running thread: to another lane of its warp, or to the scheduler.
void leave() {
    Thread& self = *current;
    unsigned ready = self.warp->runnable;
    ready &= ~(1u << self.lane);
    if (failure.empty() && ready && draw(LEAVE_WARP_ONE_IN)) {
        unsigned after = ready & ~((2u << self.lane) - 1u);
        resume(*self.warp->lanes[(unsigned)__builtin_ctz(after ? after : ready)], self.context);
    } else {
        switch_to(self.context, scheduler);
    }
}

// Abandons the launch; the running fiber is never resumed.
[[noreturn]] void fail(const std::string& message) {
    failure = message;
    switch_to(current->context, scheduler);
    std::abort();
}

void park(State state) {
    current->state = state;
    current->warp->runnable &= ~(1u << current->lane);
}

void wake(Thread& thread) {
    thread.state = State::Runnable;
    thread.warp->runnable |= 1u << thread.lane;
}

std::uint64_t source(const Warp& warp, const Thread& self, int lane) {
    if (lane < 0 || lane > 31) return self.value;
    if (!(self.mask >> lane & 1u)) fail("a shuffle of " + name_of(self) + " reads a lane outside its mask");
    return warp.lanes[(unsigned)lane]->value;
}

std::uint64_t shuffled(const Warp& warp, const Thread& self) {
    int lane = (int)self.lane, operand = (int)self.operand;
    switch (self.op) {
        case Op::Shuffle: return source(warp, self, operand & 31);
        case Op::Up: return source(warp, self, lane - operand);
        case Op::Down: return source(warp, self, lane + operand);
        default: return source(warp, self, lane ^ operand);
    }
}

std::uint64_t matched(const Warp& warp, const Thread& self) {
    std::uint64_t found = 0;
    for (auto& other : warp.lanes) {
        if (self.mask >> other->lane & 1u && other->value == self.value) found |= 1u << other->lane;
    }
    return found;
}

std::uint64_t reduced(const Warp& warp, Op op, unsigned mask) {
    bool first = true;
    std::uint64_t total = 0;
    for (auto& lane : warp.lanes) {
        if (!(mask >> lane->lane & 1u)) continue;
        std::uint64_t v = lane->value;
        auto sv = (std::int64_t)v, st = (std::int64_t)total;
        switch (op) {
            case Op::Ballot: total |= v << lane->lane; break;
            case Op::Any: case Op::Or: total |= v; break;
            case Op::All: case Op::And: total = first ? v : total & v; break;
            case Op::Add: total += v; break;
            case Op::Min: total = first || v < total ? v : total; break;
            case Op::Max: total = first || v > total ? v : total; break;
            case Op::SignedMin: total = first || sv < st ? v : total; break;
            case Op::SignedMax: total = first || sv > st ? v : total; break;
            default: break;
        }
        first = false;
    }
    return total;
}

void complete(Warp& warp, Op op, unsigned mask) {
    bool own = op == Op::Shuffle || op == Op::Up || op == Op::Down || op == Op::Xor || op == Op::Match;
    std::uint64_t common = own ? 0 : reduced(warp, op, mask);
    for (auto& lane : warp.lanes) {
        if (!(mask >> lane->lane & 1u)) continue;
        lane->result = op == Op::Match ? matched(warp, *lane) : own ? shuffled(warp, *lane) : common;
    }
    for (auto& lane : warp.lanes) {
        if (mask >> lane->lane & 1u) wake(*lane);
    }
}

void release_barrier(Block& block) {
    block.verdict = block.votes;
    block.waiting = block.votes = 0;
    for (auto& warp : block.warps) {
        for (auto& lane : warp->lanes) wake(*lane);
    }
}

template <int... I>
void call(void* kernel, const std::uint64_t* a, std::integer_sequence<int, I...>) {
    // Pointers and 64-bit integers are passed alike, and more arguments than the kernel takes do no harm.
    reinterpret_cast<void (*)(decltype((void)I, std::uint64_t())...)>(kernel)(a[I]...);
}

void thread_main() {
    arrived();
    call(launch->kernel, launch->args, std::make_integer_sequence<int, MAX_ARGUMENTS>());
    Block& block = *current->warp->block;
    park(State::Finished);
    ++block.finished;
    if (block.waiting) fail("a barrier is not reached by " + name_of(*current) + ", which ended");
    leave();
    std::abort();
}

void start(Block& block, unsigned index) {
    block.live = true;
    block.threads = launch->size;
    block.finished = block.waiting = block.votes = 0;
    block.warps.resize((launch->size + 31) / 32);
    for (unsigned t = 0; t < launch->size; ++t) {
        auto& warp = block.warps[t / 32];
        if (!warp) warp = std::make_unique<Warp>();
        warp->block = &block;
        if (warp->lanes.size() <= t % 32) warp->lanes.push_back(std::make_unique<Thread>());
        Thread& thread = *warp->lanes[t % 32];
        thread.warp = warp.get();
        thread.lane = t % 32;
        thread.place = Place{{t, 0, 0}, {index, 0, 0}, {launch->size, 1, 1}, {launch->grid, 1, 1}};
        prepare(thread.context, thread_main);
        wake(thread);
    }
}

void drop_shared(Block& block) {
    for (auto& entry : block.shared) delete entry.second;
    block.shared.clear();
    delete block.dynamic;
    block.dynamic = nullptr;
}

void report_deadlock(const Block& block) {
    for (auto& warp : block.warps) {
        for (auto& lane : warp->lanes) {
            if (lane->state == State::Collective) {
                char mask[16];
                std::snprintf(mask, sizeof mask, "%08x", lane->mask);
                failure = "a warp collective of " + name_of(*lane) + " with mask " + mask +
                          " is not reached by all its lanes";
                return;
            }
        }
    }
    failure = "a barrier of block " + std::to_string(block.warps[0]->lanes[0]->place.block.x) +
              " is not reached by all threads";
}

void run_blocks(std::vector<std::unique_ptr<Block>>& resident) {
    unsigned next = 0, live = 0;
    while (failure.empty()) {
        for (auto& block : resident) {
            if (block->live && block->finished == block->threads) {
                block->live = false;
                drop_shared(*block);
                --live;
            }
            if (!block->live && next < launch->grid) {
                start(*block, next++);
                ++live;
            }
        }
        if (!live) return;
        std::vector<Warp*> ready;
        for (auto& block : resident) {
            if (!block->live) continue;
            std::size_t before = ready.size();
            for (auto& warp : block->warps) {
                if (warp->runnable) ready.push_back(warp.get());
            }
            if (ready.size() == before) report_deadlock(*block);
        }
        if (!failure.empty()) return;
        Warp& warp = *ready[draw((unsigned)ready.size())];
        unsigned lane = draw(32);
        while (!(warp.runnable >> lane & 1u)) lane = (lane + 1) % 32;
        resume(*warp.lanes[lane], scheduler);
    }
}

}  // namespace

std::uint64_t collective(Op op, unsigned mask, std::uint64_t value, unsigned operand) {
    Thread& self = *current;
    Warp& warp = *self.warp;
    if (!(mask >> self.lane & 1u)) fail("a warp collective's mask leaves out " + name_of(self));
    self.op = op;
    self.mask = mask;
    self.operand = operand;
    self.value = value;
    park(State::Collective);
    bool all = true;
    for (unsigned lane = 0; lane < 32; ++lane) {
        if (!(mask >> lane & 1u)) continue;
        bool there = lane < warp.lanes.size() && warp.lanes[lane]->state != State::Finished;
        if (!there) fail("a warp collective of " + name_of(self) + " names a lane that ended");
        const Thread& other = *warp.lanes[lane];
        all = all && other.state == State::Collective && other.op == op && other.mask == mask;
    }
    if (all) {
        complete(warp, op, mask);
    } else {
        leave();
    }
    return self.result;
}

unsigned barrier(bool value) {
    Block& block = *current->warp->block;
    park(State::Barrier);
    block.votes += value;
    if (block.finished) fail("a barrier is reached by " + name_of(*current) + " after another thread ended");
    if (++block.waiting == block.threads) {
        release_barrier(block);
    } else {
        leave();
    }
    return block.verdict;
}

void give_way() {
    if (!draw(GIVE_WAY_ONE_IN)) leave();
}

void* shared_array(const void* key, std::size_t bytes) {
    auto& array = current->warp->block->shared[key];
    if (!array) array = new std::vector<std::uint64_t>((bytes + 7) / 8, 0xA5A5A5A5A5A5A5A5u);
    return array->data();
}

void* dynamic_shared() {
    auto& array = current->warp->block->dynamic;
    if (!array) array = new std::vector<std::uint64_t>((launch->shared_bytes + 7) / 8, 0xA5A5A5A5A5A5A5A5u);
    return array->data();
}

}  // namespace shim

// Runs a launch; returns null, or why it failed (valid until the next call).
extern "C" const char* shim_launch(const char* name, long long grid, long long size, long long shared_bytes,
                                   const std::uint64_t* args, int count, unsigned seed) {
    using namespace shim;
    static std::vector<std::unique_ptr<Block>> resident;
    Launch mine;
    launch = &mine;
    failure.clear();
    mine.kernel = dlsym(RTLD_DEFAULT, name);
    if (!mine.kernel) {
        Dl_info info;
        dladdr(reinterpret_cast<void*>(&shim_launch), &info);
        void* self = dlopen(info.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
        mine.kernel = self ? dlsym(self, name) : nullptr;
    }
    if (!mine.kernel) failure = std::string("there is no kernel ") + name;
    if (count > MAX_ARGUMENTS) failure = "a kernel has too many parameters";
    if (grid < 1 || size < 1 || size > 1024) failure = "a launch has an impossible shape";
    if (!failure.empty()) return failure.c_str();
    std::memcpy(mine.args, args, (std::size_t)count * sizeof *args);
    mine.grid = (unsigned)grid;
    mine.size = (unsigned)size;
    mine.shared_bytes = (std::size_t)shared_bytes;
    mine.random.seed(seed + 1);
    // Threads of another number of lanes need other warps.
    if (!resident.empty() && resident[0]->threads != mine.size) resident.clear();
    while (resident.size() < 3) resident.push_back(std::make_unique<Block>());
    run_blocks(resident);
    for (auto& block : resident) drop_shared(*block);
    if (failure.empty()) return nullptr;
    for (auto& block : resident) block->live = false;
    return failure.c_str();
}
