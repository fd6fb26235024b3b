package proxy

import (
	"strings"
	"testing"
	"unicode"
)

func TestParseRoleARN(t *testing.T) {
	for _, tt := range []struct {
		in         string
		path, role string // of a valid one
		wrong      string // in the error of an invalid one
	}{
		{in: "arn:aws:iam::123456789012:role/my-role", role: "my-role"},
		{in: "arn:aws:iam::123456789012:role/team/sub/my-role", path: "team/sub", role: "my-role"},
		{in: "arn:aws:iam::123456789012:role/a+b=c,d.e@f_g-h", role: "a+b=c,d.e@f_g-h"},
		{in: "arn:aws:iam::123456789012:role/p:a!t*h/r", path: "p:a!t*h", role: "r"},
		{in: "arn:aws-cn:iam::123456789012:role/r", role: "r"},
		{in: "arn:aws-us-gov:iam::123456789012:role/r", role: "r"},
		{in: "arn:aws-iso:iam::123456789012:role/r", role: "r"},
		{in: "arn:aws-iso-b:iam::123456789012:role/r", role: "r"},
		{in: "arn:aws:iam:::role/r", role: "r"},
		{in: "arn:minio:iam:us-east-1::role/idmp-kr-_zR0hQ=", role: "idmp-kr-_zR0hQ="},
		{in: "arn:minio:iam:::role/" + strings.Repeat("x", 128), role: strings.Repeat("x", 128)},
		{in: "arn:ceph:iam::tenant:role/r", role: "r"},
		{in: "arn:aws:iam::123456789012:role/" + strings.Repeat("x", 64), role: strings.Repeat("x", 64)},

		{in: "", wrong: "form"},
		{in: "arn:oops", wrong: "form"},
		{in: "my-role", wrong: "form"},
		{in: "arn:aws:iam::123456789012", wrong: "form"},
		{in: "ARN:aws:iam::123456789012:role/r", wrong: "form"},
		{in: " arn:aws:iam::123456789012:role/r", wrong: "form"},
		{in: "arn::iam::123456789012:role/r", wrong: "partition"},
		{in: "arn:AWS:iam::123456789012:role/r", wrong: "partition"},
		{in: "arn:aws:sts::123456789012:role/r", wrong: "service"},
		{in: "arn:aws:iam:US East:123456789012:role/r", wrong: "region"},
		{in: "arn:aws:iam::12345678901:role/r", wrong: "12 digits"},
		{in: "arn:aws:iam::1234567890123:role/r", wrong: "12 digits"},
		{in: "arn:aws-cn:iam::12345678901x:role/r", wrong: "12 digits"},
		{in: "arn:minio:iam::a b:role/r", wrong: "account"},
		{in: "arn:aws:iam::123456789012:user/r", wrong: "role/"},
		{in: "arn:aws:iam::123456789012:instance-profile/r", wrong: "role/"},
		{in: "arn:aws:iam::123456789012:role", wrong: "role/"},
		{in: "arn:aws:iam::123456789012:role/", wrong: "name"},
		{in: "arn:aws:iam::123456789012:role/team/", wrong: "name"},
		{in: "arn:aws:iam::123456789012:role//r", wrong: "path"},
		{in: "arn:aws:iam::123456789012:role/a//r", wrong: "path"},
		{in: "arn:aws:iam::123456789012:role/a b/r", wrong: "path"},
		{in: "arn:aws:iam::123456789012:role/a\x00/r", wrong: "path"},
		{in: "arn:aws:iam::123456789012:role/ü/r", wrong: "path"},
		{in: "arn:aws:iam::123456789012:role/r\n", wrong: "name"},
		{in: "arn:aws:iam::123456789012:role/r*", wrong: "name"},
		{in: "arn:aws:iam::123456789012:role/rôle", wrong: "name"},
		{in: "arn:aws:iam::123456789012:role/" + strings.Repeat("x", 65), wrong: "1 to 64"},
		{in: "arn:minio:iam:::role/" + strings.Repeat("x", 129), wrong: "1 to 128"},
		{in: "arn:aws:iam::123456789012:role/" + strings.Repeat("x/", 1010) + "r", wrong: "more than 2048"},
		{in: strings.Repeat("\x00", 64<<10), wrong: "more than 2048"},
	} {
		a, err := ParseRoleARN(tt.in)
		switch {
		case tt.wrong == "" && err != nil:
			t.Errorf("%v", err)
		case tt.wrong == "" && (a.Path != tt.path || a.Name != tt.role || a.String() != tt.in):
			t.Errorf("%q is %+v", tt.in, a)
		case tt.wrong != "" && (err == nil || !strings.Contains(err.Error(), tt.wrong)):
			t.Errorf("%.80q: error %v, want one about %q", tt.in, err, tt.wrong)
		}
		if err != nil {
			checkText(t, err.Error())
		}
	}
}

// checkText says what is true of every text that a pod or an Event shows.
func checkText(t *testing.T, text string) {
	t.Helper()
	if len(text) > maxText || !strings.Contains(text, " ") || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Errorf("not one line of at most %d printable bytes with a space: %q", maxText, text)
	}
}

func TestCompleteRole(t *testing.T) {
	for _, tt := range []struct{ base, in, want, wrong string }{
		{"arn:aws:iam::123456789012:role/", "my-role", "arn:aws:iam::123456789012:role/my-role", ""},
		{"arn:aws:iam::123456789012:role", "my-role", "arn:aws:iam::123456789012:role/my-role", ""},
		{"arn:aws:iam::123456789012:role/", "/my-role", "arn:aws:iam::123456789012:role/my-role", ""},
		{"arn:aws:iam::123456789012:role/", "team/my-role", "arn:aws:iam::123456789012:role/team/my-role", ""},
		{"arn:aws:iam::123456789012:role/", "/team/my-role", "arn:aws:iam::123456789012:role/team/my-role", ""},
		{"arn:aws-cn:iam::123456789012:role/team/", "my-role", "arn:aws-cn:iam::123456789012:role/team/my-role", ""},
		{"arn:aws:iam::123456789012:role/", "arn:aws:iam::999999999999:role/other", "arn:aws:iam::999999999999:role/other", ""},
		{"", "arn:aws:iam::999999999999:role/other", "arn:aws:iam::999999999999:role/other", ""},
		{"", "my-role", "", "-base-role-arn"},
		{"arn:aws:iam::123456789012:role/", "arn:oops", "", `"arn:oops" is not a role ARN`},
		{"arn:aws:iam::123456789012:role/", "//my-role", "", `"//my-role", completed`},
		{"arn:aws:iam::123456789012:role/", "/", "", "name"},
		{"arn:aws:iam::123456789012:role/", "my role", "", "name"},
	} {
		got, err := completeRole(tt.base, tt.in)
		if tt.wrong == "" && (err != nil || got.String() != tt.want) || tt.wrong != "" && (err == nil || !strings.Contains(err.Error(), tt.wrong)) {
			t.Errorf("%q below %q is %v, %v; want %s%s", tt.in, tt.base, got, err, tt.want, tt.wrong)
		}
	}
}

func FuzzRoleARN(f *testing.F) {
	for _, s := range []string{
		"arn:aws:iam::123456789012:role/my-role", "arn:aws:iam::123456789012:role/team/my-role", "arn:minio:iam:us-east-1::role/x=",
		"arn:oops", "arn:::::", "arn:aws:iam::123456789012:role/", "arn:aws:iam::123456789012:role//", "my-role", "/", "\x00\xff",
		"arn:aws:iam::123456789012:role/'; rm -rf ~; '/r", strings.Repeat("a", 3000),
	} {
		f.Add(s, "arn:aws:iam::123456789012:role/")
	}
	f.Fuzz(func(t *testing.T, s, base string) {
		a, err := ParseRoleARN(s)
		if err != nil {
			checkText(t, err.Error())
		} else if a.String() != s || len(s) > maxARN || a.Name == "" || strings.Contains(a.Name, "/") || !only(s, isGraphic) {
			t.Errorf("%q is %+v", s, a)
		}
		c, errC := completeRole(base, s)
		if errC != nil {
			checkText(t, errC.Error())
		} else if again, err := ParseRoleARN(c.String()); err != nil || again != c {
			t.Errorf("%q below %q is %v, which is %v, %v", s, base, c, again, err)
		}
		if strings.HasPrefix(s, "arn:") && (err != nil) != (errC != nil) {
			t.Errorf("an ARN does not depend on the base: %v, %v", err, errC)
		}
	})
}
