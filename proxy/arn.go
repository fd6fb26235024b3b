package proxy

import (
	"errors"
	"fmt"
	"strings"
)

const (
	maxARN      = 2048 // bytes; STS's limit for RoleArn
	maxAWSName  = 64   // bytes; IAM's limit for a role's name
	maxRoleName = 128  // bytes; MinIO makes its role IDs longer than IAM would
)

// roleARNForm is what a role ARN looks like, for people.
const roleARNForm = "arn:aws:iam::123456789012:role/my-role"

// RoleARN is the ARN of a role: of any AWS partition, or of an STS-compatible server such as MinIO, whose ARNs name a region
// and no account.
type RoleARN struct {
	Partition string // aws, aws-cn, aws-us-gov, aws-iso…, minio
	Region    string // empty with AWS
	Account   string // 12 digits or empty with AWS's partitions
	Path      string // without slashes around it; empty: none
	Name      string
}

// ParseRoleARN reads arn:<partition>:iam:<region?>:<account?>:role/<path>. Its error is one line that says what is wrong and
// quotes no more than 64 bytes of s.
func ParseRoleARN(s string) (RoleARN, error) {
	a, err := parseRoleARN(s)
	if err != nil {
		return RoleARN{}, fmt.Errorf("%s is not a role ARN such as %s: %w", quoted(s), roleARNForm, err)
	}
	return a, nil
}

func parseRoleARN(s string) (RoleARN, error) {
	if len(s) > maxARN {
		return RoleARN{}, fmt.Errorf("it has %d bytes, more than %d", len(s), maxARN)
	}
	if s != strings.TrimSpace(s) {
		return RoleARN{}, errors.New("white space is around what should have the form arn:<partition>:iam::<account>:role/<path and name>")
	}
	parts := strings.SplitN(s, ":", 6)
	if len(parts) < 6 || parts[0] != "arn" {
		return RoleARN{}, errors.New("it does not have the form arn:<partition>:iam::<account>:role/<path and name>")
	}
	a := RoleARN{Partition: parts[1], Region: parts[3], Account: parts[4]}
	path, ok := strings.CutPrefix(parts[5], "role/")
	aws := a.Partition == "aws" || strings.HasPrefix(a.Partition, "aws-")
	switch {
	case a.Partition == "" || !only(a.Partition, isLowerDigitDash):
		return RoleARN{}, errors.New("its partition is not one such as aws, aws-cn or aws-us-gov")
	case parts[2] != "iam":
		return RoleARN{}, fmt.Errorf("its service is %s, not iam", quoted(parts[2]))
	case !only(a.Region, isLowerDigitDash):
		return RoleARN{}, errors.New("its region is none")
	case aws && a.Account != "" && (len(a.Account) != 12 || !only(a.Account, isDigit)):
		return RoleARN{}, fmt.Errorf("its account %s is not 12 digits", quoted(a.Account))
	case !only(a.Account, isNameByte):
		return RoleARN{}, errors.New("its account holds a character that none has")
	case !ok:
		return RoleARN{}, wrongResource(parts[5])
	}
	a.Name = path
	if i := strings.LastIndexByte(path, '/'); i >= 0 {
		a.Path, a.Name = path[:i], path[i+1:]
		for segment := range strings.SplitSeq(a.Path, "/") {
			if segment == "" || !only(segment, isGraphic) {
				return RoleARN{}, errors.New("its path has an empty segment or a character other than graphic ASCII")
			}
		}
	}
	limit := maxRoleName
	if aws {
		limit = maxAWSName
	}
	if a.Name == "" || len(a.Name) > limit || !only(a.Name, isNameByte) {
		return RoleARN{}, fmt.Errorf("the role's name is not 1 to %d letters, digits and _+=,.@-", limit)
	}
	return a, nil
}

// wrongResource says what an ARN of IAM names that is no role.
func wrongResource(s string) error {
	for _, kind := range []string{"user", "group", "policy", "instance-profile", "oidc-provider"} {
		if strings.HasPrefix(s, kind+"/") {
			return fmt.Errorf("it names a thing of the kind %s, not a role: its resource must begin with role/", kind)
		}
	}
	return fmt.Errorf("its resource %s does not begin with role/", quoted(s))
}

// String is the ARN as it was parsed.
func (a RoleARN) String() string {
	return "arn:" + a.Partition + ":iam:" + a.Region + ":" + a.Account + ":role/" + a.PathName()
}

// PathName is the role as kube2iam's and kiam's users spell it: path/name, or the name alone.
func (a RoleARN) PathName() string {
	if a.Path == "" {
		return a.Name
	}
	return a.Path + "/" + a.Name
}

// completeRole is the ARN of a role that is named by its ARN, or by name, path/name or /path/name below the base.
func completeRole(base, role string) (RoleARN, error) {
	if strings.HasPrefix(role, "arn:") {
		return ParseRoleARN(role)
	}
	if role != bare(role) {
		return RoleARN{}, fmt.Errorf("%s is not a role ARN such as %s: quotes or white space are around it", quoted(role), roleARNForm)
	}
	if base == "" {
		return RoleARN{}, fmt.Errorf("%s is not a role ARN such as %s, and short role names need imdsgate to run with -base-role-arn",
			quoted(role), roleARNForm)
	}
	a, err := parseRoleARN(complete(base, role))
	if err != nil {
		return RoleARN{}, fmt.Errorf("%s, completed by -base-role-arn, is not a role ARN such as %s: %w", quoted(role), roleARNForm, err)
	}
	return a, nil
}

// bare is s without the quotes and the white space that templates and editors leave around what they fill in.
func bare(s string) string { return strings.Trim(s, "\"' \t\r\n") }

// complete puts the base before what is no ARN.
func complete(base, s string) string {
	if strings.HasPrefix(s, "arn:") {
		return s
	}
	return strings.TrimSuffix(base, "/") + "/" + strings.TrimPrefix(s, "/")
}

// only says that every byte of s is of a kind.
func only(s string, kind func(byte) bool) bool {
	for i := range len(s) {
		if !kind(s[i]) {
			return false
		}
	}
	return true
}

func isDigit(c byte) bool          { return '0' <= c && c <= '9' }
func isLower(c byte) bool          { return 'a' <= c && c <= 'z' }
func isGraphic(c byte) bool        { return '!' <= c && c <= '~' }
func isLowerDigitDash(c byte) bool { return isLower(c) || isDigit(c) || c == '-' }

// isNameByte is [\w+=,.@-], the alphabet of role and session names.
func isNameByte(c byte) bool {
	return isLower(c) || 'A' <= c && c <= 'Z' || isDigit(c) || strings.IndexByte("_+=,.@-", c) >= 0
}

// quoted is s for a text that people read: without control characters and not longer than what shows the mistake.
func quoted(s string) string {
	const most = 64
	if len(s) > most {
		return fmt.Sprintf("%q…", s[:most])
	}
	return fmt.Sprintf("%q", s)
}
