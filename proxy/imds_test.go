package proxy

import (
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/imdsgate/imdsgate/cache"
)

// The document byte for byte: clients parse it with whatever they have.
func TestEncode(t *testing.T) {
	zone := time.FixedZone("east", 2*60*60)
	issued := time.Date(2026, 11, 21, 23, 4, 5, 999_999_999, zone)
	got := string(Encode(cache.NewCredentials("ASIAEXAMPLE", "s/e+c=r", `t<&>"\é`, issued, issued.Add(time.Hour))))
	want := `{
  "Code": "Success",
  "LastUpdated": "2026-11-21T21:04:05Z",
  "Type": "AWS-HMAC",
  "AccessKeyId": "ASIAEXAMPLE",
  "SecretAccessKey": "s/e+c=r",
  "Token": "t<&>\"\\é",
  "Expiration": "2026-11-21T22:04:05Z"
}`
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestInstanceProfile(t *testing.T) {
	now := time.Date(2026, 11, 21, 23, 4, 5, 0, time.FixedZone("east", 2*60*60))
	want := `{
  "Code": "Success",
  "LastUpdated": "2026-11-21T21:04:05Z",
  "InstanceProfileArn": "arn:aws-cn:iam::123456789012:instance-profile/a/role/b",
  "InstanceProfileId": "AIPA`
	got := string(instanceProfile("arn:aws-cn:iam::123456789012:role/a/role/b", now))
	if !strings.HasPrefix(got, want) || got != string(instanceProfile("arn:aws-cn:iam::123456789012:role/a/role/b", now)) {
		t.Error(got)
	}
}

// A second is written once; the next one is another.
func TestDate(t *testing.T) {
	v := newHeaderValues()
	zone := time.FixedZone("", 3600)
	for _, at := range []time.Time{
		time.Date(2026, 11, 21, 23, 4, 5, 0, time.UTC), time.Date(2026, 11, 22, 0, 4, 5, 999_999_999, zone), time.Date(2026, 11, 21, 23, 4, 6, 0, time.UTC),
	} {
		if got := v.date(at); len(got) != 1 || got[0] != at.UTC().Format(http.TimeFormat) {
			t.Errorf("%v: %q", at, got)
		}
	}
	l := newLab(t)
	at, err := http.ParseTime(l.get(t, "role", "/").Header.Get("Date"))
	if d := time.Since(at); err != nil || d < 0 || d > 20*time.Second {
		t.Errorf("%v, %v", at, err)
	}
}
