package cache

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	storeVersion = 1
	maxStored    = 4096     // files read at start: many times the pods of a node
	maxStoredLen = 64 << 10 // bytes of one; session tokens are a few kilobytes
	storeSuffix  = ".json"
	// clockSlack is how far in the future a file may have been written: more means that the wall clock was set back since,
	// and nothing in the file can be trusted to end in time.
	clockSlack = time.Minute
)

// store keeps issued credentials in a directory, one plain 0600 file a key, for the next run of the daemon. Sealing them with a
// key that lies beside them would protect nothing; the directory is root's and on a tmpfs. This is the only place where a
// secret is written.
type store struct {
	dir string
	// seq tells concurrent writers of one process apart; the process id those of two.
	seq chan int
}

// stored is the content of a file: the whole key, so that unequal keys never share it, whatever its name.
type stored struct {
	Version         int       `json:"version"`
	Key             Key       `json:"key"`
	AccessKeyID     string    `json:"access_key_id"`
	SecretAccessKey string    `json:"secret_access_key"`
	SessionToken    string    `json:"session_token"`
	Issued          time.Time `json:"issued"`
	Expires         time.Time `json:"expires"`
	RequestID       string    `json:"request_id,omitempty"`
}

// openStore makes the directory when it is missing and refuses one that somebody else could have written to.
func openStore(dir string) (*store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return nil, err
	}
	if !info.IsDir() {
		return nil, fmt.Errorf("%s must be a directory, not a %s: remove it", dir, info.Mode().Type())
	}
	if err := ownedAlone(info); err != nil {
		return nil, fmt.Errorf("%s %w", dir, err)
	}
	s := &store{dir: dir, seq: make(chan int, 1)}
	s.seq <- 0
	return s, nil
}

// ownedAlone refuses what another user owns or may write to or read.
func ownedAlone(info fs.FileInfo) error {
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Uid != 0 && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("belongs to user %d: it must belong to root", st.Uid)
	}
	if info.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("has mode %04o: only its owner may have access (chmod go=)", info.Mode().Perm())
	}
	return nil
}

// name of a key's file. A hash: parts of a key are long, and hold what file names cannot.
func (s *store) name(key Key) string {
	h := sha256.New()
	for _, part := range []string{
		key.RoleARN, key.SessionName, key.ExternalID, key.Namespace, key.ServiceAccount, key.Audience,
		strconv.FormatInt(int64(key.Duration), 10), key.Tags.ClusterName, key.Tags.Namespace, key.Tags.ServiceAccount,
	} {
		fmt.Fprintf(h, "%d:%s", len(part), part)
	}
	return filepath.Join(s.dir, hex.EncodeToString(h.Sum(nil)[:16])+storeSuffix)
}

// save replaces a key's file in one step: a reader, also one in another process, sees the old or the new content.
func (s *store) save(key Key, c Credentials) error {
	b, err := json.Marshal(stored{
		storeVersion, key, c.AccessKeyID, c.SecretAccessKey(), c.SessionToken(), c.Issued.UTC(), c.Expires.UTC(), c.RequestID,
	})
	if err != nil {
		return fmt.Errorf("encode credentials: %w", errors.New("not JSON")) // json's own text could quote them
	}
	n := <-s.seq
	s.seq <- n + 1
	path := s.name(key)
	temp := fmt.Sprintf("%s.%d-%d", path, os.Getpid(), n)
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL|syscall.O_NOFOLLOW, 0o600)
	if err == nil {
		_, err = f.Write(b)
		err = errors.Join(err, f.Close())
	}
	if err == nil {
		err = os.Rename(temp, path)
	}
	if err != nil {
		_ = os.Remove(temp)
		return fmt.Errorf("keep credentials for a restart: %w", err)
	}
	return nil
}

// remove forgets a key. Where two instances share the directory during an update, the other may just have written the file
// anew: then its next restart costs one STS call.
func (s *store) remove(key Key) { _ = os.Remove(s.name(key)) }

// load reads what is left of an earlier run. What cannot be used is removed; problem is told why.
func (s *store) load(now time.Time, encode func(Credentials) []byte, problem func(file string, err error)) (map[Key]*value, error) {
	dir, err := os.Open(s.dir)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	values := make(map[Key]*value)
	for {
		entries, err := dir.ReadDir(64)
		for _, e := range entries {
			path := filepath.Join(s.dir, e.Name())
			if len(values) >= maxStored || !strings.HasSuffix(e.Name(), storeSuffix) {
				// Of a writer that was killed, or nobody's. Another instance's temporary file is younger than this.
				if info, err := e.Info(); err == nil && now.Sub(info.ModTime()) > time.Minute {
					_ = os.Remove(path)
				}
				continue
			}
			key, v, err := s.read(path, now, encode)
			if err != nil {
				problem(e.Name(), err)
			}
			if v == nil {
				_ = os.Remove(path)
				continue
			}
			values[key] = v
		}
		if errors.Is(err, io.EOF) {
			return values, nil
		}
		if err != nil {
			return values, err
		}
	}
}

// read returns no value, and no error either, for credentials that have expired.
func (s *store) read(path string, now time.Time, encode func(Credentials) []byte) (Key, *value, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return Key{}, nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return Key{}, nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxStoredLen {
		return Key{}, nil, errors.New("not a regular file of at most 64 KiB")
	}
	if err := ownedAlone(info); err != nil {
		return Key{}, nil, err
	}
	b, err := io.ReadAll(io.LimitReader(f, maxStoredLen))
	if err != nil {
		return Key{}, nil, err
	}
	return s.decode(path, b, now, encode)
}

func (s *store) decode(path string, b []byte, now time.Time, encode func(Credentials) []byte) (Key, *value, error) {
	var d stored
	if err := json.Unmarshal(b, &d); err != nil {
		return Key{}, nil, errors.New("not what this version writes") // json's text could quote a secret
	}
	switch {
	case d.Version != storeVersion:
		return Key{}, nil, fmt.Errorf("version %d, not %d", d.Version, storeVersion)
	case s.name(d.Key) != path:
		return Key{}, nil, errors.New("of another key than its name says")
	case d.AccessKeyID == "" || d.SecretAccessKey == "" || d.SessionToken == "" || d.Key.Duration <= 0:
		return Key{}, nil, errors.New("incomplete")
	case d.Issued.Sub(now) > clockSlack:
		return Key{}, nil, errors.New("written in the future: the node's clock was set back")
	}
	c := NewCredentials(d.AccessKeyID, d.SecretAccessKey, d.SessionToken, d.Issued, d.Expires)
	c.RequestID = d.RequestID
	v, err := restoredValue(c, d.Key.Duration, now, encode)
	return d.Key, v, err
}

// restoredValue is what credentials of an earlier run are worth now; nil when they have expired. Their refresh is due when it
// would have been: nodes that restart together do not refresh together.
func restoredValue(c Credentials, duration time.Duration, now time.Time, encode func(Credentials) []byte) (*value, error) {
	age := max(now.Round(0).Sub(c.Issued.Round(0)), 0)
	life := min(c.Expires.Sub(c.Issued), duration)
	left := min(c.Expires.Round(0).Sub(now.Round(0)), life-age) // by the wall clock: there is no other across a restart
	if left <= margin {
		return nil, nil
	}
	v, err := newValue(c, left, now, encode)
	if err != nil {
		return nil, err
	}
	if due := jittered(life/2, rand.Float64()) - age; due < v.refreshAt.Sub(now) {
		v.refreshAt, v.refreshAtWall = now.Add(due), now.Round(0).Add(due)
	}
	return v, nil
}
