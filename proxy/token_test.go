package proxy

import (
	"bytes"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestTokenOfEarlierHolder(t *testing.T) {
	l := newLab(t)
	l.warm(t, "role")
	now := time.Now()
	for name, tc := range map[string]struct {
		issued, since time.Duration // from now
		unknown       bool
		want          int
	}{
		"issued before the holder started": {issued: -time.Minute, since: -30 * time.Second, want: 401},
		"issued after":                     {issued: -30 * time.Second, since: -time.Minute, want: 200},
		"start unknown":                    {issued: -time.Hour, unknown: true, want: 200},
		"start in the future":              {issued: -time.Hour, since: 2 * time.Hour, want: 200},
		"started two hours ago":            {issued: -time.Second, since: -2 * time.Hour, want: 200},
	} {
		c := caller("role", grant("team/my-role"), nil)
		if !tc.unknown {
			c.Since = now.Add(tc.since)
		}
		l.callers.set(podIPs["role"], c, nil)
		token := l.tokens.issue(podIPs["role"], now.Add(tc.issued), 6*time.Hour)
		for _, path := range []string{roleList + "/", roleList + "/my-role", metaData + "iam/info", metaData + "placement/region"} {
			if r := l.get(t, "role", path, tokenHeader+": "+token); r.StatusCode != tc.want {
				t.Errorf("%s: %s: %d %s", name, path, r.StatusCode, r.body)
			}
		}
		if r := l.get(t, "role", roleList+"/"); r.StatusCode != 200 {
			t.Errorf("%s: without a token: %d", name, r.StatusCode)
		}
	}
}

// What counted on a connection before its IP went to another pod counts no more.
func TestTokenOfEarlierHolderOnItsConnection(t *testing.T) {
	l := newLab(t)
	l.warm(t, "role")
	token := l.tokens.issue(podIPs["role"], time.Now().Add(-time.Minute), time.Hour)
	c := dial(t, l.addr, podIPs["role"])
	br := newReader(c)
	for i, want := range []int{200, 200, 401, 401} {
		if i == 2 {
			next := caller("next", grant("team/my-role"), nil)
			next.Since = time.Now().Add(-30 * time.Second)
			l.callers.set(podIPs["role"], next, nil)
		}
		fmt.Fprintf(c, "GET %s/ HTTP/1.1\r\nHost: 169.254.169.254\r\n%s: %s\r\n\r\n", roleList, tokenHeader, token)
		if r, err := readReply(br, "GET"); err != nil || r.StatusCode != want {
			t.Fatalf("request %d: %v, %v, want %d", i, r, err, want)
		}
	}
}

// Tokens know their time to the millisecond: one of the millisecond in which the pod began counts.
func TestTokenOfTheSameMillisecond(t *testing.T) {
	second := time.Unix(1_800_000_000, 0)
	for _, tc := range []struct {
		issued, since time.Duration
		want          bool
	}{
		{0, 900 * time.Microsecond, false},
		{900 * time.Microsecond, 0, false},
		{-time.Microsecond, 0, true},
		{0, time.Millisecond, true},
		{0, 900 * time.Millisecond, true},
		{900 * time.Millisecond, 0, false},
	} {
		if got := (issued{at: second.Add(tc.issued)}).before(second.Add(tc.since), second.Add(time.Hour)); got != tc.want {
			t.Errorf("issued %v, since %v: %v", tc.issued, tc.since, got)
		}
	}
}

// Tokens outlive the daemon with their key, and nothing else is needed.
func TestTokenSurvivesRestart(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	load := func() []byte {
		key, err := LoadTokenKey(dir)
		if err != nil {
			t.Fatal(err)
		}
		return key
	}
	a := newLab(t, func(o *Options) { o.TokenKey = load() })
	token := a.token(t, "role", "21600")
	b := newLab(t, func(o *Options) { o.TokenKey = load() })
	b.warm(t, "role")
	if r := b.get(t, "role", roleList+"/", tokenHeader+": "+token); r.StatusCode != 200 {
		t.Errorf("%d %s", r.StatusCode, r.body)
	}
	other := newLab(t)
	if r := other.get(t, "role", "/", tokenHeader+": "+token); r.StatusCode != 401 {
		t.Errorf("with another key: %d", r.StatusCode)
	}
}

func TestTokenExpires(t *testing.T) {
	tokens := newTokens(make([]byte, 32))
	ip, now := netip.MustParseAddr("10.1.2.3"), time.Now()
	token := tokens.issue(ip, now, time.Second)
	for after, want := range map[time.Duration]bool{0: true, 990 * time.Millisecond: true, time.Second + time.Millisecond: false} {
		if _, ok := tokens.check(ip, token, now.Add(after)); ok != want {
			t.Errorf("after %v: %v", after, ok)
		}
	}
	if _, ok := tokens.check(netip.MustParseAddr("10.1.2.4"), token, now); ok {
		t.Error("valid for another IP")
	}
	if again := tokens.issue(ip, now.Add(time.Millisecond), time.Second); again == token {
		t.Error("two tokens are the same")
	}
}

// A connection's MAC is computed once, for exactly that text, and only as long as the token counts.
func TestTokenShownAgain(t *testing.T) {
	tokens := newTokens(make([]byte, 32))
	ip, now := netip.MustParseAddr("10.1.2.3"), time.Now()
	token := tokens.issue(ip, now, time.Second)
	var last, none shown
	for _, never := range []string{"", string(last.token[:]), token[:55], token[:55] + "=", tokens.issue(netip.MustParseAddr("10.1.2.4"), now, time.Hour)} {
		if _, ok := tokens.checkAgain(&last, ip, never, now); ok || last != none {
			t.Errorf("%q: %v, %v", never, ok, last)
		}
	}
	first, ok := tokens.checkAgain(&last, ip, token, now)
	if !ok || first.at.UnixMilli() != now.UnixMilli() {
		t.Fatalf("%v, %v", first, ok)
	}
	forgetful := newTokens(bytes.Repeat([]byte{1}, 32)) // to which no MAC is right
	for _, tc := range []struct {
		last  shown
		token string
		after time.Duration
		want  bool
	}{
		{last, token, 0, true}, {last, token, 990 * time.Millisecond, true}, {last, token, time.Second + time.Millisecond, false},
		{last, token[:55], 0, false}, {last, token + "A", 0, false}, {last, "B" + token[1:], 0, false}, {none, token, 0, false},
	} {
		if i, ok := forgetful.checkAgain(&tc.last, ip, tc.token, now.Add(tc.after)); ok != tc.want || ok && i != first {
			t.Errorf("%q after %v: %v, %v", tc.token, tc.after, i, ok)
		}
	}
	next := tokens.issue(ip, now.Add(time.Millisecond), time.Minute)
	if i, ok := tokens.checkAgain(&last, ip, next, now.Add(2*time.Second)); !ok || string(last.token[:]) != next || last.issued != i {
		t.Errorf("the next token: %v, %v", i, ok)
	}
}

// The MAC is HMAC-SHA256 of the key, whatever was checked with the pooled state before.
func TestTokenMAC(t *testing.T) {
	key := bytes.Repeat([]byte{7}, 40)
	tokens := newTokens(key)
	ip := netip.MustParseAddr("fd00::1")
	for range 3 {
		raw, err := tokens.encoding.DecodeString(tokens.issue(ip, time.Now(), time.Minute))
		if err != nil || len(raw) != tokenRaw {
			t.Fatal(err, len(raw))
		}
		if n := tokens.encoding.EncodedLen(len(raw)); n > 64 {
			t.Errorf("%d characters do not fit the buffer of CRT 0.16", n)
		}
		mac := hmac.New(sha256.New, key)
		as16 := ip.As16()
		mac.Write(raw[:tokenHead])
		mac.Write(as16[:])
		if !bytes.Equal(mac.Sum(nil)[:tokenMACSize], raw[tokenHead:]) {
			t.Error("not the HMAC")
		}
		tokens.check(ip, strings.Repeat("A", 56), time.Now())
	}
}

func TestParseTTL(t *testing.T) {
	for s, want := range map[string]int{
		"1": 1, "300": 300, "21600": 21600, "00060": 60,
		"0": 0, "21601": 0, "65537": 0, "000060": 0, "+60": 0, "-1": 0, "6_0": 0, "0x1": 0, "1e3": 0, "": 0, " 60": 0, "60 ": 0, "٣": 0,
	} {
		ttl, ok := parseTTL(s)
		if ok != (want > 0) || ttl != time.Duration(want)*time.Second {
			t.Errorf("%q: %v %v", s, ttl, ok)
		}
	}
}

// FuzzToken: nothing but what was issued for this IP is valid, and nothing panics.
func FuzzToken(f *testing.F) {
	tokens := newTokens(bytes.Repeat([]byte("k"), 32))
	ip, now := netip.MustParseAddr("10.1.2.3"), time.Unix(1_800_000_000, 0)
	valid := tokens.issue(ip, now, time.Hour)
	f.Add(valid)
	f.Add(valid[:55] + "\n")
	f.Add(valid[:55] + "=")
	f.Add(strings.ToUpper(valid))
	f.Add("")
	f.Add(strings.Repeat("A", 56))
	f.Add(strings.Repeat("\x00", 56))
	f.Add(tokens.issue(netip.MustParseAddr("10.1.2.4"), now, time.Hour))
	f.Add(newTokens(bytes.Repeat([]byte("x"), 32)).issue(ip, now, time.Hour))
	f.Fuzz(func(t *testing.T, token string) {
		if i, ok := tokens.check(ip, token, now); ok != (token == valid) || ok && !i.at.Equal(now) {
			t.Errorf("%q: %v %v", token, i, ok)
		}
	})
}

func TestLoadTokenKey(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	var keys [8][]byte
	var wg sync.WaitGroup
	for i := range keys { // as many daemons starting at once
		wg.Go(func() {
			key, err := LoadTokenKey(dir)
			if err != nil {
				t.Error(err)
			}
			keys[i] = key
		})
	}
	wg.Wait()
	for _, key := range keys {
		if len(key) != 32 || !bytes.Equal(key, keys[0]) || bytes.Equal(key, make([]byte, 32)) {
			t.Errorf("%x, %x", key, keys[0])
		}
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 1 || entries[0].Name() != "token.key" {
		t.Errorf("%v %v", entries, err)
	}
	fi, err := os.Stat(filepath.Join(dir, "token.key"))
	if err != nil || fi.Mode() != 0o600 {
		t.Errorf("%v %v", fi.Mode(), err)
	}
	a, _ := LoadTokenKey("")
	b, err := LoadTokenKey("")
	if err != nil || len(a) != 32 || bytes.Equal(a, b) {
		t.Errorf("%x %x %v", a, b, err)
	}
}

// A key that is not whole is made anew: a daemon that refused it would refuse its pods until somebody came.
func TestLoadTokenKeyReplaces(t *testing.T) {
	for _, size := range []int{0, 31, 33} {
		dir := t.TempDir()
		if err := errors.Join(os.Chmod(dir, 0o700), os.WriteFile(filepath.Join(dir, "token.key"), make([]byte, size), 0o600)); err != nil {
			t.Fatal(err)
		}
		a, err := LoadTokenKey(dir)
		if err != nil || len(a) != 32 || bytes.Equal(a, make([]byte, 32)) {
			t.Errorf("%d bytes: %x, %v", size, a, err)
		}
		if b, err := LoadTokenKey(dir); err != nil || !bytes.Equal(a, b) {
			t.Errorf("%d bytes: %x is not kept: %x, %v", size, a, b, err)
		}
	}
}

func TestLoadTokenKeyRefuses(t *testing.T) {
	write := func(dir string, n int, mode os.FileMode) {
		path := filepath.Join(dir, "token.key")
		if err := os.WriteFile(path, make([]byte, n), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	for name, prepare := range map[string]func(dir string) string{
		"directory of others":  func(dir string) string { _ = os.Chmod(dir, 0o777); return dir },
		"directory of a group": func(dir string) string { _ = os.Chmod(dir, 0o770); return dir },
		"directory is a link":  func(dir string) string { _ = os.Symlink(dir, dir+".link"); return dir + ".link" },
		"directory is a file":  func(dir string) string { write(dir, 32, 0o600); return filepath.Join(dir, "token.key") },
		"directory is a named pipe": func(dir string) string {
			_ = syscall.Mkfifo(dir+"/pipe", 0o600)
			return dir + "/pipe"
		},
		"no such parent":     func(dir string) string { return filepath.Join(dir, "a", "b") },
		"key readable":       func(dir string) string { write(dir, 32, 0o644); return dir },
		"short key readable": func(dir string) string { write(dir, 31, 0o644); return dir },
		"key is a link": func(dir string) string {
			write(dir, 32, 0o600)
			_ = os.Rename(dir+"/token.key", dir+"/x")
			_ = os.Symlink("x", dir+"/token.key")
			return dir
		},
		"key is a dead link":  func(dir string) string { _ = os.Symlink("nothing", dir+"/token.key"); return dir },
		"key is a directory":  func(dir string) string { _ = os.Mkdir(dir+"/token.key", 0o700); return dir },
		"key is a named pipe": func(dir string) string { _ = syscall.Mkfifo(dir+"/token.key", 0o600); return dir },
	} {
		dir := t.TempDir()
		if err := os.Chmod(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if key, err := LoadTokenKey(prepare(dir)); err == nil || key != nil {
			t.Errorf("%s: %x, %v", name, key, err)
		} else {
			t.Log(name, "→", err)
		}
	}
	if os.Geteuid() == 0 {
		dir := t.TempDir()
		if err := os.Chown(dir, 65534, 65534); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadTokenKey(dir); err == nil {
			t.Error("a directory of somebody else's")
		}
	}
}
