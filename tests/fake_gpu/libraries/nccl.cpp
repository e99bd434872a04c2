// NCCL between processes of one host. Data goes through files in memory; every collective's
// signature is compared over its ranks, so that the one that skips or differs is named.
//
// An operation ends before its call returns, so ranks must issue them in one order, and a host
// that waits for another rank between two of them waits for ever.
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "stand_in.h"

extern "C" int cudaMalloc(void **address, size_t size);
extern "C" int cudaFree(void *address);

namespace {

namespace fs = std::filesystem;

enum Result { OK = 0, SYSTEM_ERROR = 2, INVALID_USAGE = 5, REMOTE_ERROR = 6 };

// ---- data types and reductions, by NCCL's numbers

enum Type { I8, U8, I32, U32, I64, U64, F16, F32, F64, BF16, TYPES };
enum Reduction { SUM, PROD, MAX, MIN, AVG, FIRST_OWN };  // own: sums of factor times value

const size_t SIZES[TYPES] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};
const char *TYPE_NAMES[TYPES] = {"int8", "uint8", "int32", "uint32", "int64",
                                 "uint64", "float16", "float32", "float64", "bfloat16"};
const char *REDUCTION_NAMES[] = {"sum", "prod", "max", "min", "avg", "scaled sum"};

struct Bfloat16 {
  uint16_t bits;
  Bfloat16(float value) {
    uint32_t whole;
    memcpy(&whole, &value, 4);
    bits = uint16_t((whole + 0x7fff + ((whole >> 16) & 1)) >> 16);
  }
  operator float() const {
    uint32_t whole = uint32_t(bits) << 16;
    float value;
    memcpy(&value, &whole, 4);
    return value;
  }
};

std::mutex factors_mutex;
std::map<int, double> factors;  // of the own reductions

struct Scale {
  int reduction;
  double factor;
};

Scale scale_of(int reduction, int ranks) {
  if (reduction == AVG) return {SUM, 1.0 / ranks};
  if (reduction < FIRST_OWN) return {reduction, 1};
  std::lock_guard<std::mutex> guard(factors_mutex);
  return {SUM, factors.at(reduction)};
}

// Every rank adds in the order of the ranks, so that all have the same bits. Half types are
// rounded once, at the end.
template <class T, class Sum>
void reduce_as(const std::vector<std::string> &parts, size_t offset, size_t count, Scale scale,
               char *out) {
  for (size_t i = 0; i < count; ++i) {
    Sum sum = 0;
    for (size_t rank = 0; rank < parts.size(); ++rank) {
      auto *values = reinterpret_cast<const T *>(parts[rank].data() + offset);
      Sum value = static_cast<Sum>(values[i]);
      if (scale.factor != 1) value = static_cast<Sum>(value * scale.factor);
      if (!rank) sum = value;
      else if (scale.reduction == SUM) sum += value;
      else if (scale.reduction == PROD) sum *= value;
      else if (scale.reduction == MAX) sum = std::max(sum, value);
      else sum = std::min(sum, value);
    }
    reinterpret_cast<T *>(out)[i] = static_cast<T>(sum);
  }
}

void reduce(const std::vector<std::string> &parts, size_t offset, size_t count, int type,
            Scale scale, char *out) {
  switch (type) {
    case I8: return reduce_as<int8_t, int8_t>(parts, offset, count, scale, out);
    case U8: return reduce_as<uint8_t, uint8_t>(parts, offset, count, scale, out);
    case I32: return reduce_as<int32_t, int32_t>(parts, offset, count, scale, out);
    case U32: return reduce_as<uint32_t, uint32_t>(parts, offset, count, scale, out);
    case I64: return reduce_as<int64_t, int64_t>(parts, offset, count, scale, out);
    case U64: return reduce_as<uint64_t, uint64_t>(parts, offset, count, scale, out);
    case F16: return reduce_as<_Float16, float>(parts, offset, count, scale, out);
    case F32: return reduce_as<float, float>(parts, offset, count, scale, out);
    case F64: return reduce_as<double, double>(parts, offset, count, scale, out);
    case BF16: return reduce_as<Bfloat16, float>(parts, offset, count, scale, out);
  }
}

// ---- communicators

struct Communicator {
  std::string folder, name;
  int ranks, rank;
  long number = 0;                // of collectives so far
  std::map<int, long> sent, got;  // messages by peer
};

thread_local std::string last_error = "no error";

int report(Result result, const Communicator &c, const std::string &text) {
  last_error = "stand-in NCCL, " + c.name + ", rank " + std::to_string(c.rank) + " of " +
               std::to_string(c.ranks) + ": " + text;
  fprintf(stderr, "%s\n", last_error.c_str());
  return result;
}

std::string path_of(const Communicator &c, const char *kind, long a, long b) {
  return c.folder + "/" + kind + std::to_string(a) + "_" + std::to_string(b);
}

// ---- files: a signature of fixed size, then the data

constexpr size_t SIGNATURE = 160;

void put(const std::string &path, const std::string &signature, const void *data, size_t size) {
  std::string partial = path + ".part";
  FILE *file = fopen(partial.c_str(), "wb");
  char head[SIGNATURE] = {};
  memcpy(head, signature.data(), std::min(signature.size(), SIGNATURE - 1));
  if (!file || fwrite(head, 1, SIGNATURE, file) != SIGNATURE ||
      fwrite(data, 1, size, file) != size || fclose(file)) {
    perror("stand-in NCCL: the memory for messages (/dev/shm) is full");
    abort();
  }
  rename(partial.c_str(), path.c_str());
}

struct Message { std::string signature, data; };

Message get(const std::string &path) {
  FILE *file = fopen(path.c_str(), "rb");
  char head[SIGNATURE];
  size_t size = size_t(fs::file_size(path)) - SIGNATURE;
  Message message{"", std::string(size, '\0')};
  if (fread(head, 1, SIGNATURE, file) != SIGNATURE ||
      fread(&message.data[0], 1, size, file) != size) {
    perror("stand-in NCCL: a message is cut");
    abort();
  }
  fclose(file);
  message.signature = head;
  return message;
}

double seconds_allowed() {
  const char *text = getenv("FAKE_GPU_NCCL_TIMEOUT");
  return text ? atof(text) : 120;
}

bool has_ended(const Communicator &c, int rank) {
  std::error_code error;
  std::string path = path_of(c, "rank", rank, 0);
  if (!fs::exists(path, error)) return false;
  pid_t pid = pid_t(atol(get(path).signature.c_str()));
  return kill(pid, 0) != 0 && errno == ESRCH;
}

// Waits for a file of a rank; empty when it is there, else what became of the rank.
std::string wait_for(const Communicator &c, int rank, const std::string &path) {
  auto start = std::chrono::steady_clock::now();
  for (int turn = 0; access(path.c_str(), F_OK) != 0; ++turn) {
    std::chrono::duration<double> waited = std::chrono::steady_clock::now() - start;
    if (waited.count() > seconds_allowed())
      return "did not come in " + std::to_string(int(waited.count())) + " s";
    bool may_be_late = turn % 200 != 199 || !has_ended(c, rank);
    if (!may_be_late && access(path.c_str(), F_OK) != 0) return "has ended and never came";
    std::this_thread::sleep_for(std::chrono::microseconds(turn < 50 ? 50 : 500));
  }
  return "";
}

// ---- operations

enum Name {
  ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST, REDUCE, SEND, RECV, ALL_TO_ALL, SPLIT
};
const char *NAMES[] = {"AllReduce", "AllGather", "ReduceScatter", "Broadcast", "Reduce",
                       "Send", "Recv", "AlltoAll", "CommSplit"};

struct Operation {
  Name name;
  const void *from;
  void *to;
  size_t count;
  int type, reduction, peer;  // peer: root, or the other end of a message
  Communicator *c;
  void *stream;
  long number = -1;  // of the collective, once posted

  size_t size() const { return count * SIZES[type]; }
  bool has_root() const { return name == BROADCAST || name == REDUCE; }
  bool is_reduction() const {
    return name == ALL_REDUCE || name == REDUCE || name == REDUCE_SCATTER;
  }
  size_t size_posted() const {
    if (name == BROADCAST && peer != c->rank) return 0;
    return name == REDUCE_SCATTER || name == ALL_TO_ALL ? size() * size_t(c->ranks) : size();
  }
  size_t size_taken() const {
    if (name == REDUCE && peer != c->rank) return 0;
    return name == ALL_GATHER || name == ALL_TO_ALL ? size() * size_t(c->ranks) : size();
  }
  std::string signature() const {
    std::string text = std::string(NAMES[name]) + " of " + std::to_string(count) + " " +
                       TYPE_NAMES[type];
    if (is_reduction())
      text += std::string(", ") + REDUCTION_NAMES[std::min(reduction, int(FIRST_OWN))];
    if (has_root()) text += ", root " + std::to_string(peer);
    return text;
  }
};

// Data on the device as host memory; host pointers (a split's) as they are.
char *bytes_at(const void *address, size_t size) {
  void *found = size ? fake_host_address(address, size) : nullptr;
  return static_cast<char *>(found ? found : const_cast<void *>(address));
}

void post(Operation &o) {
  Communicator &c = *o.c;
  size_t size = fake_has_values() || o.name == SPLIT ? o.size_posted() : 0;
  if (o.name == RECV) return;
  if (o.name == SEND) {
    size = fake_has_values() ? o.size() : 0;
    put(path_of(c, ("to" + std::to_string(o.peer) + "_").c_str(), c.rank, c.sent[o.peer]++),
        o.signature(), bytes_at(o.from, size), size);
    return;
  }
  o.number = c.number++;
  put(path_of(c, "all", o.number, c.rank), o.signature(), bytes_at(o.from, size), size);
}

int receive(Operation &o) {
  Communicator &c = *o.c;
  std::string path = path_of(c, ("to" + std::to_string(c.rank) + "_").c_str(), o.peer,
                             c.got[o.peer]++);
  std::string missing = wait_for(c, o.peer, path);
  if (!missing.empty())
    return report(REMOTE_ERROR, c, "rank " + std::to_string(o.peer) + " " + missing + " to send " +
                                       o.signature());
  Message message = get(path);
  unlink(path.c_str());
  std::string wanted = o.signature().substr(strlen("Recv"));
  if (message.signature.substr(strlen("Send")) != wanted)
    return report(INVALID_USAGE, c, o.signature() + " from rank " + std::to_string(o.peer) +
                                        ", which sent: " + message.signature);
  memcpy(bytes_at(o.to, message.data.size()), message.data.data(), message.data.size());
  return OK;
}

// All ranks' posts of one collective, in the order of the ranks.
int gather(Operation &o, std::vector<std::string> &parts) {
  Communicator &c = *o.c;
  std::string place = o.signature() + ", number " + std::to_string(o.number);
  for (int rank = 0; rank < c.ranks; ++rank) {
    std::string path = path_of(c, "all", o.number, rank);
    std::string missing = wait_for(c, rank, path);
    if (!missing.empty())
      return report(REMOTE_ERROR, c, "rank " + std::to_string(rank) + " " + missing + ": " + place);
    Message message = get(path);
    if (message.signature != o.signature())
      return report(INVALID_USAGE, c, place + ", but rank " + std::to_string(rank) +
                                          " issues: " + message.signature);
    parts.push_back(std::move(message.data));
  }
  // All ranks have posted this one, so all have read the one before.
  if (o.number) unlink(path_of(c, "all", o.number - 1, c.rank).c_str());
  return OK;
}

void take(const Operation &o, const std::vector<std::string> &parts) {
  size_t size = o.size(), rank = size_t(o.c->rank);
  Scale scale = o.is_reduction() ? scale_of(o.reduction, o.c->ranks) : Scale{SUM, 1};
  size_t ranks = parts.size();
  switch (o.name) {
    case ALL_REDUCE: return reduce(parts, 0, o.count, o.type, scale, bytes_at(o.to, size));
    case REDUCE:
      if (o.peer == o.c->rank) reduce(parts, 0, o.count, o.type, scale, bytes_at(o.to, size));
      return;
    case REDUCE_SCATTER:
      return reduce(parts, size * rank, o.count, o.type, scale, bytes_at(o.to, size));
    case BROADCAST:
      memcpy(bytes_at(o.to, size), parts[size_t(o.peer)].data(), size);
      return;
    default: break;
  }
  char *out = bytes_at(o.to, size * ranks);
  for (size_t from = 0; from < ranks; ++from)
    memcpy(out + from * size, parts[from].data() + (o.name == ALL_TO_ALL ? size * rank : 0), size);
}

int complete(Operation &o) {
  if (o.name == SEND) return OK;
  if (o.name == RECV) return receive(o);
  std::vector<std::string> parts;
  if (int error = gather(o, parts)) return error;
  if (fake_has_values() || o.name == SPLIT) take(o, parts);
  return OK;
}

using Group = std::vector<Operation>;

int run(Group group) {  // a copy: a replay counts its collectives anew
  for (auto &operation : group) post(operation);
  for (auto &operation : group)
    if (int error = complete(operation)) return error;
  return OK;
}

int run_captured(void *group) { return run(*static_cast<Group *>(group)); }
void forget_captured(void *group) { delete static_cast<Group *>(group); }

thread_local int depth = 0;
thread_local Group queued;

int flush() {
  Group group;
  group.swap(queued);
  Group captured;
  for (auto &o : group) {
    std::string text = o.signature() + (o.name == SEND ? " to " : o.name == RECV ? " from " : "") +
                       (o.name == SEND || o.name == RECV ? std::to_string(o.peer) : "") + ", " +
                       o.c->name;
    fake_launch(FAKE_NCCL, o.stream, text.c_str(), o.size());
    const char *race = nullptr;
    if (o.name != RECV) race = fake_touch(o.stream, o.from, o.size_posted(), 0, text.c_str());
    if (!race && o.to) race = fake_touch(o.stream, o.to, o.size_taken(), 1, text.c_str());
    if (race) return report(INVALID_USAGE, *o.c, race);
    if (fake_is_capturing(o.stream)) captured.push_back(o);
  }
  if (captured.empty()) return run(group);
  auto *kept = new Group(captured);
  fake_capture(captured[0].stream, run_captured, forget_captured, kept);
  return OK;
}

int add(Operation operation) {
  queued.push_back(operation);
  return depth ? OK : flush();
}

// ---- making communicators

struct Id { char text[128]; };

const std::string ROOM = "/dev/shm/fake_nccl";

void sweep() {  // rooms whose processes ended long ago
  std::error_code error;
  auto old = fs::file_time_type::clock::now() - std::chrono::hours(1);
  for (auto &entry : fs::directory_iterator(ROOM, error))
    if (fs::last_write_time(entry, error) < old) fs::remove_all(entry, error);
}

int join(void **made, const std::string &id, int ranks, int rank, const std::string &name) {
  auto *c = new Communicator{ROOM + "/" + id, name, ranks, rank, 0, {}, {}};
  std::error_code error;
  fs::create_directories(c->folder, error);
  fake_launch(FAKE_NCCL, nullptr, ("CommInit " + name).c_str(), 0);
  put(path_of(*c, "rank", rank, 0), std::to_string(getpid()), nullptr, 0);
  std::string missing;
  for (int other = 0; other < ranks; ++other)
    if (!wait_for(*c, other, path_of(*c, "rank", other, 0)).empty())
      missing += " " + std::to_string(other);
  if (!missing.empty())
    return report(REMOTE_ERROR, *c,
                  "CommInitRank waits for ranks" + missing + ", which never call it");
  *made = c;
  return OK;
}

// The name is the one field of ncclConfig_t that is read; it is there since 2.27.
struct Config {
  size_t size;
  unsigned magic, version;
  int numbers[4];
  const char *net;
  int more_numbers[2];
  const char *name;
};

std::string name_in(const void *config, const std::string &otherwise) {
  auto *c = static_cast<const Config *>(config);
  bool is_named = c && c->size >= sizeof(Config) && c->name && *c->name;
  return "communicator " + (is_named ? std::string(c->name) : otherwise);
}

int leave(Communicator *c) {
  std::error_code error;
  put(path_of(*c, "end", c->rank, 0), "", nullptr, 0);
  bool is_last = true;
  for (int rank = 0; rank < c->ranks; ++rank)
    is_last &= fs::exists(path_of(*c, "end", rank, 0), error);
  if (is_last) fs::remove_all(c->folder, error);
  delete c;
  return OK;
}

Communicator *of(void *communicator) { return static_cast<Communicator *>(communicator); }

}  // namespace

extern "C" {

int ncclGetVersion(int *version) { return *version = 22907, OK; }

int ncclGetUniqueId(Id *id) {
  sweep();
  std::random_device random;
  *id = {};
  snprintf(id->text, sizeof id->text, "%08x%08x", random(), random());
  return OK;
}

int ncclCommInitRank(void **made, int ranks, Id id, int rank) {
  return join(made, id.text, ranks, rank, name_in(nullptr, id.text));
}
int ncclCommInitRankConfig(void **made, int ranks, Id id, int rank, void *config) {
  return join(made, id.text, ranks, rank, name_in(config, id.text));
}
int ncclCommInitRankScalable(void **made, int ranks, int rank, int, Id *ids, void *config) {
  return join(made, ids[0].text, ranks, rank, name_in(config, ids[0].text));
}

// Ranks of one colour, ordered by key and then by rank; a colour below 0 takes no part.
int ncclCommSplit(void *parent, int colour, int key, void **made, void *config) {
  Communicator &c = *of(parent);
  std::vector<int> all(size_t(c.ranks) * 2), own{colour, key};
  Operation o{SPLIT, own.data(), all.data(), 2, I32, SUM, 0, &c, nullptr};
  if (int error = run({o})) return error;
  *made = nullptr;
  if (colour < 0) return OK;
  std::vector<std::pair<int, int>> members;
  for (int rank = 0; rank < c.ranks; ++rank)
    if (all[size_t(rank) * 2] == colour) members.push_back({all[size_t(rank) * 2 + 1], rank});
  std::sort(members.begin(), members.end());
  int rank = int(std::find(members.begin(), members.end(), std::pair<int, int>(key, c.rank)) -
                 members.begin());
  std::string id = fs::path(c.folder).filename().string() + "." + std::to_string(c.number) + "." +
                   std::to_string(colour);
  return join(made, id, int(members.size()), rank, name_in(config, id));
}

int ncclCommDestroy(void *c) { return leave(of(c)); }
int ncclCommAbort(void *c) { return leave(of(c)); }
int ncclCommFinalize(void *) { return OK; }
int ncclCommCount(void *c, int *count) { return *count = of(c)->ranks, OK; }
int ncclCommUserRank(void *c, int *rank) { return *rank = of(c)->rank, OK; }
int ncclCommGetAsyncError(void *, int *error) { return *error = OK, OK; }
int ncclCommRegister(void *, void *, size_t, void **handle) { return *handle = nullptr, OK; }
int ncclCommDeregister(void *, void *) { return OK; }
int ncclMemAlloc(void **address, size_t size) { return cudaMalloc(address, size) ? 1 : OK; }
int ncclMemFree(void *address) { return cudaFree(address) ? 1 : OK; }
const char *ncclGetErrorString(int code) { return code ? "stand-in NCCL error" : "no error"; }
const char *ncclGetLastError(void *) { return last_error.c_str(); }

int ncclGroupStart() { return ++depth, OK; }
int ncclGroupEnd() { return --depth ? OK : flush(); }

int ncclAllReduce(const void *from, void *to, size_t count, int type, int reduction, void *c,
                  void *stream) {
  return add({ALL_REDUCE, from, to, count, type, reduction, 0, of(c), stream});
}
int ncclReduce(const void *from, void *to, size_t count, int type, int reduction, int root,
               void *c, void *stream) {
  return add({REDUCE, from, to, count, type, reduction, root, of(c), stream});
}
int ncclAllGather(const void *from, void *to, size_t count, int type, void *c, void *stream) {
  return add({ALL_GATHER, from, to, count, type, 0, 0, of(c), stream});
}
int ncclReduceScatter(const void *from, void *to, size_t count, int type, int reduction, void *c,
                      void *stream) {
  return add({REDUCE_SCATTER, from, to, count, type, reduction, 0, of(c), stream});
}
int ncclBroadcast(const void *from, void *to, size_t count, int type, int root, void *c,
                  void *stream) {
  return add({BROADCAST, from, to, count, type, 0, root, of(c), stream});
}
int ncclBcast(void *data, size_t count, int type, int root, void *c, void *stream) {
  return add({BROADCAST, data, data, count, type, 0, root, of(c), stream});
}
int ncclAlltoAll(const void *from, void *to, size_t count, int type, void *c, void *stream) {
  return add({ALL_TO_ALL, from, to, count, type, 0, 0, of(c), stream});
}
int ncclSend(const void *from, size_t count, int type, int peer, void *c, void *stream) {
  return add({SEND, from, nullptr, count, type, 0, peer, of(c), stream});
}
int ncclRecv(void *to, size_t count, int type, int peer, void *c, void *stream) {
  return add({RECV, nullptr, to, count, type, 0, peer, of(c), stream});
}

int ncclRedOpCreatePreMulSum(int *reduction, void *factor, int type, int, void *) {
  static int next = FIRST_OWN;
  std::lock_guard<std::mutex> guard(factors_mutex);
  *reduction = next++;
  factors[*reduction] = type == F64   ? *static_cast<double *>(factor)
                        : type == F32 ? *static_cast<float *>(factor)
                        : type == F16 ? float(*static_cast<_Float16 *>(factor))
                                      : float(*static_cast<Bfloat16 *>(factor));
  return OK;
}
int ncclRedOpDestroy(int, void *) { return OK; }

}  // extern "C"
