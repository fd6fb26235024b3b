package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"log/slog"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the golden files and README's flag table anew")

func env(kv ...string) func(string) string {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return func(k string) string { return m[k] }
}

func TestConfigPrecedence(t *testing.T) {
	for _, tt := range []struct {
		name string
		args []string
		env  []string
		get  func(*Config) any
		want any
	}{
		{"default", nil, nil, func(c *Config) any { return c.Port }, 8254},
		{"environment", nil, []string{"IMDSGATE_PORT", "9000"}, func(c *Config) any { return c.Port }, 9000},
		{"flag wins", []string{"-port=9001"}, []string{"IMDSGATE_PORT", "9000"}, func(c *Config) any { return c.Port }, 9001},
		{"two dashes", []string{"--port", "9001"}, nil, func(c *Config) any { return c.Port }, 9001},
		{"downward API", nil, []string{"NODE_NAME", "n1"}, func(c *Config) any { return c.Policy.Node }, "n1"},
		{"own variable before the downward API", nil, []string{"NODE_NAME", "n1", "IMDSGATE_NODE", "n2"}, func(c *Config) any { return c.Node }, "n2"},
		{"host addresses", nil, []string{"HOST_IP", "10.0.0.1,fd00::1"}, func(c *Config) any { return c.HostIPs }, []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}},
		{"mapped address", []string{"-host-ip=::ffff:10.0.0.1"}, nil, func(c *Config) any { return c.HostIPs }, []netip.Addr{netip.MustParseAddr("10.0.0.1")}},
		{"list replaces its default", []string{"-audiences=a,b", "-audiences=c"}, nil, func(c *Config) any { return c.Policy.Audiences }, []string{"a", "b", "c"}},
		{"list from the environment", nil, []string{"IMDSGATE_ALLOW", "/latest/meta-data/a, /latest/meta-data/b"}, func(c *Config) any { return c.Allow }, []string{"/latest/meta-data/a", "/latest/meta-data/b"}},
		{"bool", nil, []string{"IMDSGATE_IMDSV1", "false"}, func(c *Config) any { return c.IMDSv1 }, false},
		{"duration", nil, nil, func(c *Config) any { return c.IdentifyTimeout }, 450 * time.Millisecond},
		{"chained", []string{"-intermediate-role-arn=arn:aws:iam::123456789012:role/hop"}, nil, func(c *Config) any { return c.Policy.Chained }, true},
		{"cleanup has no variable", nil, []string{"IMDSGATE_CLEANUP", "true"}, func(c *Config) any { return c.Cleanup }, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c, err := parseConfig(tt.args, env(tt.env...), os.Stderr)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, tt.get(c), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestConfigInvalid(t *testing.T) {
	good := []string{"-node=n", "-host-ip=10.0.0.1"}
	for _, tt := range []struct {
		name string
		args []string
		want string // in the error: what is wrong and what to do
	}{
		{"node", []string{"-host-ip=10.0.0.1"}, "NODE_NAME from spec.nodeName"},
		{"host-ip", []string{"-node=n"}, "HOST_IP from status.hostIP"},
		{"wildcard", []string{"-node=n", "-host-ip=0.0.0.0"}, "the node's own address"},
		{"wildcard v6", []string{"-node=n", "-host-ip=::"}, "the node's own address"},
		{"two of a family", []string{"-node=n", "-host-ip=10.0.0.1,10.0.0.2"}, "one IPv4 and one IPv6"},
		{"no address", []string{"-node=n", "-host-ip=node1"}, "is not an IP address"},
		{"port", append(good, "-port=0"), "1 to 65534"},
		{"port clash", append(good, "-ops-addr=:8255"), "pod-facing"},
		{"ops-addr", append(good, "-ops-addr=9181"), "host:port"},
		{"redirect", append(good, "-redirect=nft"), "iptables, none"},
		{"log-format", append(good, "-log-format=xml"), "json, text"},
		{"rate", append(good, "-sts-rate=0"), "-sts-rate"},
		{"hold", append(good, "-identify-timeout=2s"), "SDKs give up"},
		{"allow", append(good, "-allow=/latest/user-data"), "user-data"},
		{"issuer", append(good, "-issuer=irsa"), "-issuer"},
		{"session", append(good, "-session-duration=15m"), "-session-duration"},
		{"chained session", append(good, "-session-duration=2h", "-intermediate-role-arn=arn:aws:iam::123456789012:role/hop"), "1h"},
		{"chained web identity", append(good, "-issuer=web-identity", "-intermediate-role-arn=arn:aws:iam::123456789012:role/hop"), "leave it out"},
		{"intermediate", append(good, "-intermediate-role-arn=hop"), "-intermediate-role-arn"},
		{"argument", append(good, "serve"), "unexpected argument"},
		{"unknown flag", []string{"-nodename=x"}, "-help"},
		{"bad value", []string{"-port=many"}, "-port"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var stderr bytes.Buffer
			closed := false
			a := app{stdout: &stderr, stderr: &stderr, closeEndpoint: func(context.Context, *Config, *slog.Logger) error {
				closed = true
				return nil
			}}
			err := a.run(t.Context(), tt.args, env())
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error %v, want it to say %q", err, tt.want)
			}
			if code := exitCode(err, &stderr); code != 2 {
				t.Errorf("exit code %d, want 2", code)
			}
			if !closed {
				t.Error("a wrong flag left the endpoint open")
			}
		})
	}
}

// TestGuardFirst: a node whose guard cannot be installed runs nothing.
func TestGuardFirst(t *testing.T) {
	want := errors.New("operation not permitted")
	var stderr bytes.Buffer
	a := app{stdout: &stderr, stderr: &stderr, closeEndpoint: func(context.Context, *Config, *slog.Logger) error { return want }}
	err := a.run(t.Context(), []string{"-node=n", "-host-ip=127.0.0.1"}, env())
	if !errors.Is(err, want) {
		t.Fatalf("error %v, want the guard's", err)
	}
	if code := exitCode(err, &stderr); code != 1 {
		t.Errorf("exit code %d, want 1", code)
	}
	for _, args := range [][]string{{}, {"-node=n", "-port=many"}, {"-nodename=n"}, {"-node=n", "-host-ip=127.0.0.1", "-session-duration=1s"}} {
		closed := false
		a.closeEndpoint = func(context.Context, *Config, *slog.Logger) error { closed = true; return nil }
		if err := a.run(t.Context(), args, env()); exitCode(err, &stderr) != 2 || !closed {
			t.Errorf("%q: %v, and the endpoint is closed: %v", args, err, closed)
		}
	}
}

// TestOneShotTypo: asking what is wrong, with a typing error, changes nothing on the node.
func TestOneShotTypo(t *testing.T) {
	var stderr bytes.Buffer
	a := app{stdout: &stderr, stderr: &stderr, closeEndpoint: func(context.Context, *Config, *slog.Logger) error {
		t.Error("the node was changed")
		return nil
	}}
	for _, args := range [][]string{
		{"-check", "-nodename=x"}, {"-nodename=x", "--check"}, {"-cleanup", "-port=many"}, {"-port=many", "-cleanup=true"},
		{"-bad", "-probe"}, {"-bad", "-version"}, {"-guard-only", "-guard=false"},
	} {
		if err := a.run(t.Context(), args, env()); exitCode(err, &stderr) != 2 {
			t.Errorf("%q: %v", args, err)
		}
	}
	if err := a.run(t.Context(), []string{"-check"}, env("IMDSGATE_PORT", "many")); exitCode(err, &stderr) != 2 {
		t.Errorf("a wrong environment: %v", err)
	}
}

// TestGuardOnly: the guard needs no configuration.
func TestGuardOnly(t *testing.T) {
	var stderr bytes.Buffer
	closed := 0
	a := app{stdout: &stderr, stderr: &stderr, closeEndpoint: func(_ context.Context, c *Config, _ *slog.Logger) error {
		closed++
		if !c.Guard {
			return errors.New("no guard")
		}
		return nil
	}}
	if err := a.run(t.Context(), []string{"-guard-only"}, env()); err != nil || closed != 1 {
		t.Errorf("%v, closed %d times", err, closed)
	}
	if err := a.run(t.Context(), []string{"-guard-only", "-guard-priority=high"}, env()); exitCode(err, &stderr) != 2 || closed != 2 {
		t.Errorf("a wrong flag: %v, closed %d times", err, closed)
	}
}

func TestVersionAndHelp(t *testing.T) {
	var out bytes.Buffer
	a := app{stdout: &out, stderr: &out, closeEndpoint: func(context.Context, *Config, *slog.Logger) error {
		t.Error("asking for help changed the node")
		return nil
	}}
	if err := a.run(t.Context(), []string{"-version"}, env()); err != nil || !strings.HasPrefix(out.String(), "imdsgate ") {
		t.Errorf("-version: %v, %q", err, out.String())
	}
	out.Reset()
	if err := a.run(t.Context(), []string{"-help"}, env()); exitCode(err, &out) != 0 {
		t.Errorf("-help: %v", err)
	}
	golden(t, "testdata/help.golden", out.Bytes())
}

func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s differs (make docs writes it anew):\n%s", file, diff)
	}
}

// TestReadmeFlags keeps README's table equal to -help.
func TestReadmeFlags(t *testing.T) {
	var b strings.Builder
	b.WriteString("| flag | default | meaning |\n|---|---|---|\n")
	var c Config
	var ips []string
	c.flags(&ips).VisitAll(func(f *flag.Flag) {
		_, usage := flag.UnquoteUsage(f)
		def := ""
		if f.DefValue != "" {
			def = "`" + f.DefValue + "`"
		}
		b.WriteString("| `-" + f.Name + "` | " + def + " | " + strings.ReplaceAll(usage, "|", `\|`) + " |\n")
	})
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	section := regexp.MustCompile(`(?s)(<!-- flags -->\n).*?(<!-- /flags -->)`)
	want := section.ReplaceAll(readme, []byte("${1}"+strings.ReplaceAll(b.String(), "$", "$$")+"${2}"))
	golden(t, "../../README.md", want)
}
