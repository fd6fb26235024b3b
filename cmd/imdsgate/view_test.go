package main

import (
	"io"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/imdsgate/imdsgate/cmd/imdsgate/page"
)

// What an instance says of its settings makes the same settings again, so -check judges by them; what is given to -check
// itself wins.
func TestSettingsOfTheRunningInstance(t *testing.T) {
	parse := func(getenv func(string) string, args ...string) *Config {
		t.Helper()
		c, err := parseConfig(args, getenv, io.Discard)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	daemon := parse(env("NODE_NAME", "n1", "HOST_IP", "10.0.0.1,fd00::1", "IMDSGATE_STS_RATE", "3"),
		"-issuer=web-identity", "-audiences=sts.amazonaws.com,vault", "-allow=/latest/meta-data/tags/", "-allow=/latest/meta-data/x", "-session-duration=90m", "-imdsv1=false", "-guard-priority", "7")
	v := &page.View{Flags: daemon.InEffect}
	again := parse(asSet(v, env()), "-check", "shop/cart-1")
	again.Check, again.Args = false, nil
	flags := func(c *Config) map[string]string {
		all := map[string]string{}
		for _, f := range c.InEffect {
			all[f.Name] = f.Value
		}
		return all
	}
	if d := cmp.Diff(flags(daemon), flags(again)); d != "" {
		t.Errorf("settings (-instance +check):\n%s", d)
	}
	if again.Policy.Issuer != "web-identity" || again.IMDSv1 || len(again.Policy.Audiences) != 2 || len(again.HostIPs) != 2 || len(again.Allow) != 2 {
		t.Errorf("%+v", again)
	}
	own := parse(asSet(v, env("IMDSGATE_STS_RATE", "5")), "-issuer=assume-role", "-check")
	if own.Policy.Issuer != "assume-role" || own.STSRate != 5 || own.Node != "n1" {
		t.Errorf("what is given does not win: %+v", own)
	}
	changed := map[string]bool{}
	for _, f := range daemon.InEffect {
		changed[f.Name] = !f.Default
	}
	for name, want := range map[string]bool{"node": true, "host-ip": true, "issuer": true, "sts-rate": true, "imdsv1": true, "port": false, "guard": false, "kubeconfig": false} {
		if changed[name] != want {
			t.Errorf("-%s counts as set: %v", name, changed[name])
		}
	}
	if _, ok := changed["check"]; ok {
		t.Error("what to do instead of serving is no setting")
	}
}
